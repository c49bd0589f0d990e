"""Tasks about icons, animals and shapes: K5, K7, K10, K13."""

from __future__ import annotations

import random

from lightning_pfl.benchmark.composition import edited
from lightning_pfl.benchmark.edits import Mark
from lightning_pfl.benchmark.marks import Bars, Colour, Dial
from lightning_pfl.benchmark.suite.library import Shelf
from lightning_pfl.benchmark.suite.picking import COLOURS, THINGS, framed, view
from lightning_pfl.benchmark.suite.recipes import Draft

CLASSES = {"mammal": "animal/mammal", "bird": "animal/bird", "marine": "animal/marine", "bug": "animal/bug"}
HOURS = ("twelve", "three", "six", "nine")
BARS = ("first", "second", "third", "fourth")
CORNERS = {"circle": 0, "triangle": 3, "square": 4}
TINTS = ("red", "green", "blue")
SHAPES_AND_TINTS = (*CORNERS, *TINTS)


def animal_class(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """K5: to which class of animals does it belong?"""
    shown = framed(rng, shelf.of([CLASSES[goal]]))
    return Draft((shown,), "Which class of animals does this one belong to?", tuple(CLASSES), goal)


def clock(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """K7: which hour does a clock with a picture on its face show?"""
    colour = (rng.randrange(160), rng.randrange(160), rng.randrange(160))
    dial = Dial(HOURS.index(goal) * 180, colour, ticks=rng.random() < 0.5)
    return Draft((edited(view(rng, shelf.of(THINGS)), dial),), "Which hour does the clock show?", HOURS, goal)


def highest_bar(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """K10: which of four bars is the highest?"""
    heights = [round(rng.uniform(0.1, 0.7), 3) for _ in BARS]
    heights[BARS.index(goal)] = round(rng.uniform(0.85, 1.0), 3)
    one: Colour = rng.choice(list(COLOURS.values()))
    colours = [one] * 4 if rng.random() < 0.5 else [rng.choice(list(COLOURS.values())) for _ in BARS]
    chart = edited(view(rng, shelf.of(THINGS)), Bars(tuple(heights), tuple(colours)))
    return Draft((chart,), "Which bar is the highest?", BARS, goal)


def shape(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """K13: which shape is drawn over the picture, or of which colour is it?"""
    form = goal if goal in CORNERS else rng.choice(tuple(CORNERS))
    tint = goal if goal in TINTS else rng.choice(TINTS)
    place = (round(rng.uniform(0.35, 0.65), 3), round(rng.uniform(0.35, 0.65), 3), round(rng.uniform(0.22, 0.32), 3))
    mark = Mark(CORNERS[form], *place, COLOURS[tint], round(rng.uniform(0, 360), 1))
    asked = "shape" if goal in CORNERS else "colour"
    choices = tuple(CORNERS) if goal in CORNERS else TINTS
    return Draft(
        (edited(view(rng, shelf.of(THINGS)), mark),), f"Which {asked} is drawn over the picture?", choices, goal
    )
