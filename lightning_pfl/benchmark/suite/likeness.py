"""Tasks about what several pictures share: A10, A11, B6, B10."""

from __future__ import annotations

import random

from lightning_pfl.benchmark.drawings import FLUENT, OPENMOJI, TWITTER
from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.suite.library import Shelf
from lightning_pfl.benchmark.suite.picking import THINGS, different, framed
from lightning_pfl.benchmark.suite.recipes import Draft

STYLES = {"outlined": OPENMOJI, "shaded": FLUENT, "flat": TWITTER}
CONCEPTS = ("animal", "vehicle", "clothing", "building", "tool", "plant")


def style(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """A10: in which style are two of three things drawn?"""
    styles = [goal] * 3
    styles[rng.randrange(3)] = rng.choice([name for name in STYLES if name != goal])
    images = tuple(framed(rng, shelf.of(THINGS, [STYLES[name]])) for name in styles)
    return Draft(images, "In which style are most of the three things drawn?", tuple(STYLES), goal)


def both_animals(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """A11: do both pictures show an animal?"""
    kinds = ["animal", "animal"]
    if goal == "no":
        kinds[rng.randrange(2)] = rng.choice(THINGS[1:])
    images = tuple(framed(rng, shelf.of([kind])) for kind in kinds)
    return Draft(images, "Do both pictures show an animal?", ("yes", "no"), goal)


def common(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """B6: of which kind are all three things?"""
    images = tuple(View(picture.path) for picture in different(rng, shelf.of([goal]), 3))
    return Draft(images, "What do the three pictures have in common?", CONCEPTS, goal)


def query(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """B10: three things of one kind and a fourth: is it of that kind too?"""
    kind, other = rng.sample(CONCEPTS, 2)
    *examples, asked = (View(picture.path) for picture in different(rng, shelf.of([kind]), 4))
    if goal == "negative":
        asked = View(different(rng, shelf.of([other]), 1)[0].path)
    question = "The first three pictures share a concept. Does the fourth have it (positive) or not (negative)?"
    return Draft((*examples, asked), question, ("positive", "negative"), goal)
