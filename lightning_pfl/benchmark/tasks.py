"""What a task is: questions about pictures with a closed list of answers, split by concept.

Start at `Task`. Tasks are made by `families`, read from and written to the published JSON format by `records`, and
turned into batches by `batches`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lightning_pfl.benchmark.images import View

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        id: unique among the examples of a task.
        images: what is shown, in order.
        question: with one `<image>` mark per picture and the choice list written out.
        answer: one of `choices`, or any words where there are none.
        choices: the possible answers in the order of the question; empty for an open question.
    """

    id: str
    images: tuple[View, ...]
    question: str
    answer: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """Examples of one kind in one domain.

    Attributes:
        name: unique, such as "animal-photo"; fit for a path.
        family: tasks of one family ask the same question of different domains or degrees: they are related.
        train: balanced in any prefix as far as the pictures allow, so that the first n are a fair sample of size n.
        val: other concepts than `train`.
        test: other concepts than `train` and `val`.
        licences: of the pictures.
    """

    name: str
    family: str
    train: tuple[Example, ...]
    val: tuple[Example, ...]
    test: tuple[Example, ...]
    licences: tuple[str, ...]

    @property
    def choices(self) -> tuple[str, ...]:
        """All answers that occur as a choice, in the order of the first question."""
        return tuple(dict.fromkeys(choice for example in self.train for choice in example.choices))

    @property
    def chance(self) -> float:
        """Accuracy on `test` of always giving its most frequent answer."""
        return max(Counter(example.answer for example in self.test).values()) / len(self.test)

    def with_train(self, num_examples: int) -> Task:
        """The same task with only the first so many training examples.

        Raises:
            ValueError: fewer than one.
        """
        if num_examples < 1:
            raise ValueError(f"`num_examples` must be at least 1, but is {num_examples}.")
        return replace(self, train=self.train[:num_examples])


def written_question(question: str, choices: Sequence[str], num_images: int = 1) -> str:
    """The prompt in the published form: marks, question, choice list.

    Example:
        >>> written_question("Is it a bird?", ["yes", "no"])
        '<image> Is it a bird? Choice list:[yes, no]'
    """
    return f"{IMAGE_MARK * num_images} {question} Choice list:[{', '.join(choices)}]"


def option_ids(tokenizer: PreTrainedTokenizerBase, choices: Sequence[str]) -> list[int]:
    """First token of each choice as it follows "Answer:", which is what a candidate-row loss tells apart.

    Raises:
        ValueError: two choices begin with the same token, so that no first token can tell them apart.
    """
    ids = [tokenizer(" " + choice, add_special_tokens=False)["input_ids"][0] for choice in choices]
    for index, token in enumerate(ids):
        if token in ids[:index]:
            first, second = choices[ids.index(token)], choices[index]
            raise ValueError(
                f"Choices must differ in their first token, but {first!r} and {second!r} both begin with "
                f"{tokenizer.decode([token])!r} for this tokenizer. Rename one of them."
            )
    return ids


def balanced(examples: Iterable[Example], num_examples: int | None = None) -> tuple[Example, ...]:
    """Take examples answer by answer in turn until all, or `num_examples`, are taken, each answer's in their order."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.answer, []).append(example)
    queues = [list(reversed(group)) for _, group in sorted(groups.items())]
    taken: list[Example] = []
    while any(queues):
        taken += [queue.pop() for queue in queues if queue]
    return tuple(taken[:num_examples])


def check_disjoint(task: Task) -> None:
    """Refuse a task that shows one image file on two sides of its split.

    Raises:
        ValueError: names the file and the two sides.
    """
    sides = {"train": task.train, "val": task.val, "test": task.test}
    seen: dict[object, str] = {}
    for side, examples in sides.items():
        for path in {view.path for example in examples for view in example.images}:
            if seen.setdefault(path, side) != side:
                raise ValueError(f"{task.name}: {path} is shown both in {seen[path]} and in {side}.")
