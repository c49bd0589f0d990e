"""Task families with room for collaboration: one question, asked of several domains or degrees.

Start at `build_tasks`. A family was kept if a linear probe on the frozen features gains at least five points from the
pooled data of all its tasks, at some realistic number of examples per task; `benchmarks/task_headroom.py` measures it.
Everything is a function of names: the same packages give the same examples on any machine.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from lightning_pfl.benchmark import drawings, photographs
from lightning_pfl.benchmark.edits import Blur, Brightness, Edit, Jpeg, Mark, Noise, Place, Repeat
from lightning_pfl.benchmark.images import Picture, View, of_split
from lightning_pfl.benchmark.tasks import Example, Task, balanced, check_disjoint, written_question

SPLIT_SIZES: Mapping[str, int] = {"train": 320, "val": 100, "test": 200}
"""Examples per split, where the pictures suffice."""

Recipe = Callable[[random.Random], tuple[Edit, ...]]


@functools.cache
def pictures_of(domain: str, *, cache: Path | None = None) -> tuple[Picture, ...]:
    """All pictures of a domain, listed once per process.

    Args:
        domain: "google", "twitter", "fluent", "openmoji" (emoji artists), "art4apps", "openclipart" or "photo".
        cache: cache folder.

    Raises:
        ValueError: an unknown domain.
        PackageUnavailableError: a package could not be fetched.
    """
    if domain in drawings.EMOJI_DOMAINS:
        return tuple(drawings.emoji(domain, cache=cache))
    if domain == "art4apps":
        return tuple(drawings.art4apps(cache=cache))
    if domain == "openclipart":
        return tuple(drawings.openclipart(cache=cache))
    if domain == "photo":
        return tuple(photographs.stamps(cache=cache) + photographs.scenes(cache=cache))
    known = [*drawings.EMOJI_DOMAINS, "art4apps", "openclipart", "photo"]
    raise ValueError(f"`domain` must be one of {known}, but is {domain!r}.")


def animal_task(domain: str) -> Task:
    """Which class of animals is this? Mammal, bird, marine animal, bug."""
    words = {"animal/mammal": "mammal", "animal/bird": "bird", "animal/marine": "marine", "animal/bug": "bug"}
    question = "Which class of animals does this one belong to?"
    return class_task(f"animal-{domain}", "animal", pictures_of(domain), words, question)


def food_task(domain: str) -> Task:
    """What sort of food is this? Fruit, vegetable, sweet, drink, meal."""
    words = {f"food/{sort}": sort for sort in ("fruit", "vegetable", "sweet", "drink", "meal")}
    return class_task(f"food-{domain}", "food", pictures_of(domain), words, "What sort of food is this?")


def kind_task(domain: str) -> Task:
    """What kind of thing is this? Seven kinds."""
    kinds = ("animal", "food", "vehicle", "clothing", "building", "tool", "plant")
    pictures = pictures_of(domain)
    words = {picture.category: picture.kind for picture in pictures if picture.kind in kinds}
    return class_task(f"kind-{domain}", "kind", pictures, words, "What kind of thing is this?", choices=kinds)


def defect_task(domain: str, degree: int) -> Task:
    """What is wrong with the picture? Nothing, blur, noise, darkness, compression; `degree` from 1 (faint) to 4."""
    recipes: dict[str, Recipe] = {
        "fine": lambda _: (),
        "blurry": lambda _: (Blur(0.3 + 0.5 * degree),),
        "noisy": lambda rng: (Noise(5.0 * degree, rng.randrange(10**6)),),
        "dark": lambda _: (Brightness(1 - 0.13 * degree),),
        "compressed": lambda _: (Jpeg(max(4, 34 - 8 * degree)),),
    }
    question = "What is the quality problem of this picture?"
    return edited_task(f"defect-{domain}-{degree}", "defect", pictures_of(domain), recipes, question)


def place_task(domain: str) -> Task:
    """Where is the thing? A small picture near one edge of a white one: left, right, top, bottom."""
    scale = 0.35
    room = 1 - scale

    def at(axis: int, near: bool) -> Recipe:
        def recipe(rng: random.Random) -> tuple[Edit, ...]:
            along, off = rng.random() * room, rng.random() * 0.15
            edge = off if near else room - off
            return (Place(edge, along, scale) if axis == 0 else Place(along, edge, scale),)

        return recipe

    recipes = {"left": at(0, True), "right": at(0, False), "top": at(1, True), "bottom": at(1, False)}
    return edited_task(f"place-{domain}", "place", pictures_of(domain), recipes, "Where in the picture is the thing?")


def count_task(domain: str) -> Task:
    """How many are there? One to four copies of one picture."""

    def copies(number: int) -> Recipe:
        return lambda rng: (Repeat(tuple(sorted(rng.sample(range(9), number)))),)

    recipes = {word: copies(number) for number, word in enumerate(("one", "two", "three", "four"), start=1)}
    return edited_task(f"count-{domain}", "count", pictures_of(domain), recipes, "How many things are in the picture?")


def shape_task(domain: str) -> Task:
    """Which shape is drawn over the picture? Circle, triangle, square, of any colour, size and place."""

    def outline(corners: int) -> Recipe:
        def recipe(rng: random.Random) -> tuple[Edit, ...]:
            colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
            x, y, radius, turn = (
                rng.uniform(0.3, 0.7),
                rng.uniform(0.3, 0.7),
                rng.uniform(0.18, 0.28),
                rng.uniform(0, 360),
            )
            return (Mark(corners, x, y, radius, colour, turn),)

        return recipe

    recipes = {"circle": outline(0), "triangle": outline(3), "square": outline(4)}
    return edited_task(
        f"shape-{domain}", "shape", pictures_of(domain), recipes, "Which shape is drawn over the picture?"
    )


DOMAINS: Mapping[str, tuple[str, ...]] = {
    "animal": ("photo", "art4apps", "openclipart", "fluent", "google"),
    "food": ("openclipart", "fluent", "google", "twitter"),
    "kind": ("art4apps", "fluent", "google", "twitter"),
    "defect": ("photo", "art4apps", "openclipart", "fluent"),
    "place": ("photo", "art4apps", "fluent", "google"),
    "count": ("photo", "art4apps", "fluent", "google"),
    "shape": ("photo", "art4apps", "fluent", "google"),
}
"""The domains whose tasks make up each family."""


_BUILDERS: Mapping[str, Callable[[str], Task]] = {
    "animal": animal_task,
    "food": food_task,
    "kind": kind_task,
    "defect": functools.partial(defect_task, degree=4),
    "place": place_task,
    "count": count_task,
    "shape": shape_task,
}


def build_task(family: str, domain: str) -> Task:
    """Build one task of a family, in one of `DOMAINS` or another one.

    Args:
        family: a name out of `DOMAINS`.
        domain: as of `pictures_of`; classes of things need one that has names for them.

    Raises:
        ValueError: an unknown family or domain.
        PackageUnavailableError: a package could not be fetched.
    """
    if family not in _BUILDERS:
        raise ValueError(f"`family` must be one of {sorted(_BUILDERS)}, but is {family!r}.")
    return _BUILDERS[family](domain)


def build_tasks(families: Iterable[str] = tuple(DOMAINS)) -> tuple[Task, ...]:
    """Build all tasks of some families, family by family, in the order of `DOMAINS`.

    Args:
        families: names out of `DOMAINS`; all by default.

    Raises:
        ValueError: an unknown family.
        PackageUnavailableError: a package could not be fetched.
    """
    return tuple(build_task(family, domain) for family in families for domain in DOMAINS.get(family, ("",)))


def class_task(
    name: str,
    family: str,
    pictures: Sequence[Picture],
    words: Mapping[str, str],
    question: str,
    *,
    choices: Sequence[str] | None = None,
) -> Task:
    """A task whose answer is a word for the picture's category.

    Args:
        name: of the task.
        family: of the task.
        pictures: those with a category in `words` are used, once each.
        words: category -> answer.
        question: in words.
        choices: answers in the order in which they are offered; the order of `words` by default.
    """
    offered = tuple(choices or dict.fromkeys(words.values()))
    text = written_question(question, offered)

    def examples(split: str) -> tuple[Example, ...]:
        chosen = [picture for picture in of_split(pictures, split) if picture.category in words]
        random.Random(f"{name}/{split}").shuffle(chosen)
        made = [
            Example(f"{name}/{split}/{index}", (View(picture.path),), text, words[picture.category], offered)
            for index, picture in enumerate(chosen)
        ]
        return balanced(made, SPLIT_SIZES[split])

    return _checked(name, family, examples, [picture for picture in pictures if picture.category in words])


def edited_task(
    name: str, family: str, pictures: Sequence[Picture], recipes: Mapping[str, Recipe], question: str
) -> Task:
    """A task whose answer is what was done to a picture.

    Args:
        name: of the task.
        family: of the task.
        pictures: any; a picture may be used several times on its side of the split.
        recipes: answer -> edits drawn with the example's own generator; answers are balanced.
        question: in words.
    """
    offered = tuple(recipes)
    text = written_question(question, offered)

    def examples(split: str) -> tuple[Example, ...]:
        pool = of_split(pictures, split)
        made = []
        for index in range(SPLIT_SIZES[split]):
            rng = random.Random(f"{name}/{split}/{index}")
            answer = offered[index % len(offered)]
            view = View(rng.choice(pool).path, recipes[answer](rng))
            made.append(Example(f"{name}/{split}/{index}", (view,), text, answer, offered))
        return tuple(made)

    return _checked(name, family, examples, pictures)


def _checked(
    name: str, family: str, examples: Callable[[str], tuple[Example, ...]], pictures: Sequence[Picture]
) -> Task:
    licences = tuple(sorted({picture.licence for picture in pictures}))
    task = Task(name, family, examples("train"), examples("val"), examples("test"), licences)
    check_disjoint(task)
    return task
