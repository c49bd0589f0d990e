"""Tasks about food: K1, K11, K16. One question of three sets of artists, with no, half a, or a wrong context."""

from __future__ import annotations

import random

from lightning_pfl.benchmark.suite.library import Shelf
from lightning_pfl.benchmark.suite.picking import framed
from lightning_pfl.benchmark.suite.recipes import Draft

SORTS = ("fruit", "vegetable", "sweet", "drink", "meal")

_NEAR = {"fruit": "vegetable", "vegetable": "meal", "sweet": "drink", "drink": "fruit", "meal": "sweet"}
_PLACES = {
    ("fruit", "vegetable"): "at the greengrocer's",
    ("meal", "vegetable"): "from the kitchen garden's cook",
    ("drink", "sweet"): "at the coffee shop",
    ("drink", "fruit"): "at the juice bar",
    ("meal", "sweet"): "at the bakery",
}
_WRONG = {
    "fruit": "I picked it from a tree.",
    "vegetable": "I pulled it out of the soil.",
    "sweet": "It came in a gift box with a ribbon.",
    "drink": "I was thirsty and the waiter poured it.",
    "meal": "The chef served it hot with a sauce.",
}


def _food(rng: random.Random, goal: str, shelf: Shelf, domains: tuple[str, ...], context: str = "") -> Draft:
    shown = framed(rng, shelf.of([f"food/{goal}"], domains))
    return Draft((shown,), f"{context}What sort of food is this?", SORTS, goal)


def plain(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """K1: no context."""
    return _food(rng, goal, shelf, ("google", "openclipart", "stamp"))


def hinted(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """K11: a true context that leaves two sorts."""
    other = rng.choice([_NEAR[goal], next(sort for sort, near in _NEAR.items() if near == goal)])
    place = _PLACES[tuple(sorted((goal, other)))]  # type: ignore[index]  # every near pair is listed
    return _food(rng, goal, shelf, ("fluent", "art4apps", "stamp"), f"I got this {place}. ")


def misled(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """K16: a wrong context."""
    wrong = rng.choice([sort for sort in SORTS if sort != goal])
    return _food(rng, goal, shelf, ("twitter", "openmoji", "openclipart"), f"Somebody says: {_WRONG[wrong]} ")
