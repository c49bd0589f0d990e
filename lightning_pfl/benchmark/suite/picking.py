"""Drawing pictures with a generator: one, several of different concepts, several of one thing by different artists."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from lightning_pfl.benchmark.composition import edited
from lightning_pfl.benchmark.edits import Place, Turn
from lightning_pfl.benchmark.images import Picture, View

THINGS = ("animal", "vehicle", "clothing", "tool", "instrument", "building", "plant", "sport", "household")
"""Kinds of pictures that show one thing and are no food, face or flag."""

T = TypeVar("T")

COLOURS = {
    "red": (215, 45, 45),
    "green": (40, 150, 60),
    "blue": (50, 80, 215),
    "yellow": (225, 190, 30),
    "purple": (140, 60, 175),
    "orange": (240, 130, 30),
}


def view(rng: random.Random, pictures: Sequence[Picture]) -> View:
    """One of the pictures as it is."""
    return View(rng.choice(pictures).path)


def framed(rng: random.Random, pictures: Sequence[Picture], *, mirror: bool = True) -> View:
    """One of the pictures, a little smaller and off the middle, mirrored half of the time if that may be."""
    shown = view(rng, pictures)
    if mirror and rng.random() < 0.5:
        shown = edited(shown, Turn(0, mirror=True))
    scale = round(rng.uniform(0.84, 1.0), 3)
    return edited(shown, Place(round(rng.random() * (1 - scale), 3), round(rng.random() * (1 - scale), 3), scale))


def different(rng: random.Random, pictures: Sequence[Picture], count: int) -> list[Picture]:
    """So many pictures of different concepts.

    Raises:
        ValueError: there are not that many concepts.
    """
    found: dict[str, Picture] = {}
    for picture in rng.sample(list(pictures), len(pictures)):
        found.setdefault(picture.concept, picture)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"{count} different concepts are needed, but there are only {len(found)}.")


def until(draw: Callable[[], T], keep: Callable[[T], bool], what: str) -> T:
    """Draw again until it may be kept.

    Raises:
        ValueError: a thousand draws gave none.
    """
    for _ in range(1000):
        if keep(drawn := draw()):
            return drawn
    raise ValueError(f"{what}: a thousand draws found none; the pictures of this side do not suffice.")


def any_places(rng: random.Random, count: int) -> tuple[int, ...]:
    """So many different cells of the 3 x 3 grid of `edits.Repeat`."""
    return tuple(sorted(rng.sample(range(9), count)))
