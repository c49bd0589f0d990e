"""Tasks about damage to surfaces: A3 (two), A6 (four). A surface is a small part of a photographed scene, enlarged."""

from __future__ import annotations

import random

from lightning_pfl.benchmark.composition import edited
from lightning_pfl.benchmark.edits import Crop
from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.marks import Scratch, Spots
from lightning_pfl.benchmark.suite.library import Shelf
from lightning_pfl.benchmark.suite.picking import view
from lightning_pfl.benchmark.suite.recipes import Draft


def two(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """A3: is one of two surfaces damaged?"""
    return _several(rng, goal, shelf, 2, "Is one of the two surfaces damaged?")


def four(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """A6: is one of four surfaces damaged?"""
    return _several(rng, goal, shelf, 4, "Is one of the four surfaces damaged?")


def _several(rng: random.Random, goal: str, shelf: Shelf, count: int, question: str) -> Draft:
    surfaces = [_surface(rng, shelf) for _ in range(count)]
    if goal == "yes":
        index = rng.randrange(count)
        surfaces[index] = _damaged(rng, surfaces[index])
    return Draft(tuple(surfaces), question, ("yes", "no"), goal)


def _surface(rng: random.Random, shelf: Shelf) -> View:
    side = round(rng.uniform(0.25, 0.4), 3)
    left, top = (round(rng.uniform(0.5 - side, 0.5), 3) for _ in range(2))
    return edited(view(rng, shelf.photographs("scene")), Crop((left, top, round(left + side, 3), round(top + side, 3))))


def _damaged(rng: random.Random, surface: View) -> View:
    """Several scratches, or several holes."""
    light = (235, 235, 230) if rng.random() < 0.5 else (15, 12, 10)
    if rng.random() < 0.5:
        for _ in range(rng.randint(2, 4)):
            x, y = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9)
            points = [(round(x, 3), round(y, 3))]
            for _ in range(3):
                x, y = x + rng.uniform(-0.3, 0.3), y + rng.uniform(-0.3, 0.3)
                points.append((round(x, 3), round(y, 3)))
            surface = edited(surface, Scratch(tuple(points), light, round(rng.uniform(0.015, 0.03), 3)))
        return surface
    discs = tuple(
        (round(rng.uniform(0.1, 0.9), 3), round(rng.uniform(0.1, 0.9), 3), round(rng.uniform(0.03, 0.08), 3))
        for _ in range(rng.randint(3, 6))
    )
    return edited(surface, Spots(discs, light))
