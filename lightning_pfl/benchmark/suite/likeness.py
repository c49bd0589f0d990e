"""Tasks about what several pictures share: A10, A11, B6, B10."""

from __future__ import annotations

import random

from lightning_pfl.benchmark.drawings import EMOJI_DOMAINS
from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.suite.library import Shelf
from lightning_pfl.benchmark.suite.picking import THINGS, different, framed
from lightning_pfl.benchmark.suite.recipes import Draft

CONCEPTS = ("animal", "vehicle", "clothing", "building", "tool", "plant")


def style(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """A10: are three things drawn by one artist?"""
    artist, other = rng.sample(EMOJI_DOMAINS, 2)
    artists = [artist] * 3
    if goal == "no":
        artists[rng.randrange(3)] = other
    images = tuple(framed(rng, shelf.of(THINGS, [name])) for name in artists)
    return Draft(images, "Are all three things drawn in the same style?", ("yes", "no"), goal)


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
