"""Tasks about figures of speech: B2, B5, B8, B11. The thing of a phrase is tested in another artist's drawing."""

from __future__ import annotations

import random
from collections.abc import Mapping

from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.suite.library import Shelf
from lightning_pfl.benchmark.suite.named import IDIOMS, SIMILES
from lightning_pfl.benchmark.suite.picking import framed
from lightning_pfl.benchmark.suite.recipes import Draft, shuffled

PLACES = ("first", "second", "third", "fourth")


def _among_four(
    rng: random.Random, goal: str, shelf: Shelf, phrases: Mapping[str, str], phrase: str
) -> tuple[View, ...]:
    """The thing of a phrase at the place that the goal names, and things of three other phrases around it."""
    others = rng.sample([other for other in phrases if other != phrase], 3)
    others.insert(PLACES.index(goal), phrase)
    return tuple(framed(rng, shelf.showing(phrases[other])) for other in others)


def simile(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """B2: which of four pictures stands for a quality?"""
    quality = rng.choice(list(SIMILES))
    images = _among_four(rng, goal, shelf, SIMILES, quality)
    return Draft(images, f"Which picture stands for {quality}?", PLACES, goal)


def idiom(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """B5: which of four pictures ends an idiom?"""
    beginning = rng.choice(list(IDIOMS))
    images = _among_four(rng, goal, shelf, IDIOMS, beginning)
    return Draft(images, f'Which picture completes "{beginning} ..."?', PLACES, goal)


def stands_for(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """B8: does the picture stand for a quality?"""
    quality, other = rng.sample(list(SIMILES), 2)
    shown = framed(rng, shelf.showing(SIMILES[quality if goal == "yes" else other]))
    return Draft((shown,), f"Does the picture stand for {quality}?", ("yes", "no"), goal)


def quality(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """B11: which of four qualities does the picture stand for?"""
    others = rng.sample([other for other in SIMILES if other != goal], 3)
    shown = framed(rng, shelf.showing(SIMILES[goal]))
    return Draft((shown,), "Which quality does the picture stand for?", shuffled(rng, [goal, *others]), goal)
