"""Tasks that count: A1, A8, K2, K12."""

from __future__ import annotations

import random

from lightning_pfl.benchmark.composition import edited
from lightning_pfl.benchmark.edits import Repeat
from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.suite.library import PHOTOGRAPHS, Shelf
from lightning_pfl.benchmark.suite.picking import THINGS, any_places, view
from lightning_pfl.benchmark.suite.recipes import Draft

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
CLOTHES = NUMBERS[:5]
SHAPES = NUMBERS[:6]
SUMS = NUMBERS[1:6]


def _copies(rng: random.Random, shown: View, count: int) -> View:
    return edited(shown, Repeat(any_places(rng, count)))


def clothes(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """A1: one to five copies of a piece of clothing."""
    shown = view(rng, shelf.of(["clothing"]))
    picture = _copies(rng, shown, NUMBERS.index(goal) + 1)
    return Draft((picture,), "How many pieces of clothing are in the picture?", CLOTHES, goal)


def more(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """A8: two photographs of cut-out animals; which shows more of them?"""
    animals = shelf.of(["animal"], PHOTOGRAPHS)
    few = rng.randint(1, 3)
    counts = (few, rng.randint(few + 2, 6))
    if goal == "first":
        counts = (counts[1], counts[0])
    images = tuple(_copies(rng, view(rng, animals), count) for count in counts)
    return Draft(images, "Which picture shows more animals?", ("first", "second"), goal)


def things(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """K2: one to six copies of a thing; open question."""
    shown = view(rng, shelf.of(["tool", "instrument", "household", "sport"]))
    picture = _copies(rng, shown, NUMBERS.index(goal) + 1)
    return Draft((picture,), "How many things are there? Answer with one word.", SHAPES, goal)


def sums(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """K12: two pictures with one to three things each, which are to be added; open question."""
    total = NUMBERS.index(goal) + 1
    first = rng.randint(max(1, total - 3), min(3, total - 1))
    images = tuple(_copies(rng, view(rng, shelf.of(THINGS)), count) for count in (first, total - first))
    return Draft(images, "How many things are there in both pictures together? Answer with one word.", SUMS, goal)
