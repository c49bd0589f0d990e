"""Tasks about clothes: A4 (what replaced what), A7 (their main colour)."""

from __future__ import annotations

import random

from lightning_pfl.benchmark.composition import edited
from lightning_pfl.benchmark.images import Picture, View
from lightning_pfl.benchmark.marks import Colourise
from lightning_pfl.benchmark.suite.library import Shelf
from lightning_pfl.benchmark.suite.picking import COLOURS, different, framed
from lightning_pfl.benchmark.suite.recipes import Draft

HUES = tuple(COLOURS)
SORTS = ("hat", "shoe", "garment")
_SIGNS = {
    "hat": {"hat", "cap", "crown", "helmet", "sombrero", "fedora", "turban", "tophat"},
    "shoe": {"shoe", "boot", "sandal", "sneaker", "hiking", "tennis"},
    "garment": {
        "shirt",
        "jean",
        "dress",
        "coat",
        "vest",
        "bikini",
        "swimsuit",
        "short",
        "skirt",
        "pullover",
        "uniform",
        "suit",
        "sari",
        "pant",
        "jacket",
        "sweatshirt",
        "brief",
        "raincoat",
        "clothe",
        "sleeve",
        "smock",
        "overall",
        "camicia",
    },
}


def sort_of(picture: Picture) -> str | None:
    """Hat, shoe or garment, by the words of a clothing picture's concept; None for anything else."""
    words = set(picture.concept.split())
    if picture.kind != "clothing":
        return None
    return next((sort for sort, signs in _SIGNS.items() if words & signs), None)


def caption(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """A4: the second picture shows what instead of the first one's?"""
    before = rng.choice([sort for sort in SORTS if sort != goal])
    images = tuple(framed(rng, _of_sort(shelf, sort)) for sort in (before, goal))
    return Draft(images, f"Instead of a {before}, the second picture shows a ...", SORTS, goal)


def _of_sort(shelf: Shelf, sort: str) -> tuple[Picture, ...]:
    return shelf.where(sort, lambda picture: sort_of(picture) == sort)


def main_colour(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """A7: which colour do three of four pieces of clothing have?"""
    colours = [COLOURS[goal]] * 4
    colours[rng.randrange(4)] = COLOURS[rng.choice([name for name in HUES if name != goal])]
    pictures = different(rng, shelf.of(["clothing"]), 4)
    images = tuple(edited(View(p.path), Colourise(colour)) for p, colour in zip(pictures, colours, strict=True))
    return Draft(images, "Which colour do most of the pieces of clothing have?", HUES, goal)
