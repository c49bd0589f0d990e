"""From a task's description to its examples: answers in turn, each example drawn with a generator of its own.

Start at `TaskSpec` (what a task is and where it stands in the scenario) and `build_task`. An example is a recipe: the
names of pictures and what is done to them. Example i of a split is drawn with `random.Random(f"{suite}/{task}/
{split}/{i}")`, so it depends on nothing but names, and the first n examples are the same whatever the size asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from lightning_pfl.benchmark.composition import files_of
from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.suite.library import PACKAGE_OF, Library, Shelf
from lightning_pfl.benchmark.tasks import IMAGE_MARK, Example, Task, written_question

SUITE = "lightning-pfl-1"
"""Name and version of the suite; part of every example's seed. It changes when an example does."""


@final
@dataclass(frozen=True)
class Sizes:
    """Examples per split."""

    train: int
    val: int
    test: int


STANDARD = Sizes(400, 100, 100)
SMOKE = Sizes(32, 16, 16)


@final
@dataclass(frozen=True)
class Draft:
    """One question before it has a number.

    Attributes:
        images: what is shown, in order.
        question: in words, without marks and choice list.
        choices: what is offered for this example.
        answer: the right one.
    """

    images: tuple[View, ...]
    question: str
    choices: tuple[str, ...]
    answer: str


Ask = Callable[[random.Random, str, Shelf], Draft]
"""Draw a question with a generator, for a goal out of the task's goals, from the pictures of one side."""


@final
@dataclass(frozen=True)
class TaskSpec:
    """A task of the suite and its place in the scenario.

    Attributes:
        name: such as "A1-wear-count"; names the data set's folder and seeds its examples.
        analogue: the published task whose place it takes, such as "Fashion200K-0".
        client: that has it, from 0; None for a task that no client trains on.
        time: at which it comes, from 0; None for a task that no client trains on.
        asks: in one line, for lists.
        goals: what is dealt out in turn, so that answers are balanced: mostly the answers themselves.
        ask: draws one example.
        open_ended: the prompt lists no choices; `choices` of its examples are then the words that occur as answers.
    """

    name: str
    analogue: str
    client: int | None
    time: int | None
    asks: str
    goals: tuple[str, ...]
    ask: Ask
    open_ended: bool = False

    @property
    def id(self) -> str:
        """Short name, such as "A1"."""
        return self.name.split("-")[0]

    @property
    def kind(self) -> str:
        """As the scenario files call it: "multi-choice" or "open-ended"."""
        return "open-ended" if self.open_ended else "multi-choice"


def build_task(spec: TaskSpec, library: Library, sizes: Sizes = STANDARD) -> Task:
    """Draw all examples of a task.

    Args:
        spec: the task.
        library: the pictures.
        sizes: how many examples per split.

    Returns:
        A task whose `family` is its own name; `graph` says what it is related to.

    Raises:
        ValueError: a side without the pictures that the task needs, or with too few to make that many different
            examples.
    """
    sides = {split: draw_split(spec, library, split, getattr(sizes, split)) for split in ("train", "val", "test")}
    shown = {
        path
        for examples in sides.values()
        for example in examples
        for view in example.images
        for path in files_of(view)
    }
    licences = tuple(sorted({library.picture(path).licence for path in shown}))
    return Task(spec.name, spec.name, sides["train"], sides["val"], sides["test"], licences)


def draw_split(spec: TaskSpec, library: Library, split: str, num_examples: int) -> tuple[Example, ...]:
    """Draw the first so many examples of one split; no two of them are the same.

    Raises:
        ValueError: see `build_task`.
    """
    shelf = library.shelf(split)
    examples: list[Example] = []
    seen: set[tuple[object, ...]] = set()
    for index in range(num_examples):
        rng = random.Random(f"{SUITE}/{spec.name}/{split}/{index}")
        goal = spec.goals[index % len(spec.goals)]
        for _ in range(_ATTEMPTS):
            draft = spec.ask(rng, goal, shelf)
            if (draft.images, draft.question, draft.answer) not in seen:
                break
        else:
            raise ValueError(
                f"{spec.name} cannot make {num_examples} different {split} examples: the pictures give no new one "
                f"after {index}. Ask for fewer."
            )
        seen.add((draft.images, draft.question, draft.answer))
        examples.append(_example(spec, draft, f"{spec.name}/{split}/{index}"))
    return tuple(examples)


_ATTEMPTS = 50


def sources_of(task: Task, library: Library) -> Mapping[str, str]:
    """The packages behind a task's pictures, "name version" -> licence, in the order of their names."""
    domains = {
        library.picture(path).domain
        for examples in (task.train, task.val, task.test)
        for example in examples
        for view in example.images
        for path in files_of(view)
    }
    packages = {PACKAGE_OF[domain] for domain in domains}
    return {f"{package.name} {package.version}": package.licence for package in sorted(packages, key=lambda p: p.name)}


def chance(task: Task) -> float:
    """Expected test accuracy without looking: of one and the same answer, or of any that is offered, if that is more.

    `Task.chance` is right where all examples offer the same answers; here some offer four out of many.
    """
    guessing = sum(1 / len(example.choices) for example in task.test) / len(task.test)
    return max(task.chance, guessing)


def shuffled(rng: random.Random, items: Sequence[str]) -> tuple[str, ...]:
    """The items in an order drawn with the generator."""
    return tuple(rng.sample(list(items), len(items)))


def _example(spec: TaskSpec, draft: Draft, identity: str) -> Example:
    if spec.open_ended:
        question = f"{IMAGE_MARK * len(draft.images)} {draft.question}"
    else:
        question = written_question(draft.question, draft.choices, len(draft.images))
    assert draft.answer in draft.choices, f"{identity}: {draft.answer!r} is not among {draft.choices}"
    return Example(identity, draft.images, question, draft.answer, draft.choices)
