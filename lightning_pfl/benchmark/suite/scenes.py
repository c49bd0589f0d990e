"""Tasks about where things are and what changed: A2, A5, A9, A12, B4, K15."""

from __future__ import annotations

import random

from lightning_pfl.benchmark.composition import Item, edited, scene
from lightning_pfl.benchmark.edits import Contrast, Edit, Place, Turn
from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.marks import Break, Colourise, Spots
from lightning_pfl.benchmark.suite.library import Shelf
from lightning_pfl.benchmark.suite.picking import COLOURS, THINGS, different, framed, until, view
from lightning_pfl.benchmark.suite.recipes import Draft

EDITS = ("added", "removed", "replaced")
RELATIONS = ("left", "right", "above", "below")
MOVES = ("left", "right", "up", "down", "larger", "smaller")
CHANGES = ("turned", "smaller", "coloured", "redrawn")
STATES = ("whole", "broken", "faded", "dirty")
KINDS = ("animal", "vehicle", "building", "plant")

_QUARTERS = {
    "top left": (0.02, 0.02),
    "top right": (0.52, 0.02),
    "bottom left": (0.02, 0.52),
    "bottom right": (0.52, 0.52),
}


def edit_made(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """A2: a scene of two or three things before and after one was added, removed or replaced."""
    pictures = [View(picture.path) for picture in different(rng, shelf.of(THINGS), 4)]
    places = rng.sample(sorted(_QUARTERS.values()), 3)
    items = [Item(shown, *place, 0.46) for shown, place in zip(pictures, places, strict=False)]
    small, large = items[:2], items[:3]
    if goal == "replaced":
        count = rng.choice((2, 3))
        before = items[:count]
        index = rng.randrange(count)
        after = [*before[:index], Item(pictures[3], before[index].x, before[index].y, 0.46), *before[index + 1 :]]
    else:
        before, after = (small, large) if goal == "added" else (large, small)
    question = "What happened to one thing from the first picture to the second?"
    return Draft((scene(before), scene(after)), question, EDITS, goal)


def relation(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """A5: where is the animal, seen from the vehicle?"""
    near, far = round(rng.uniform(0.0, 0.12), 3), round(rng.uniform(0.48, 0.56), 3)
    across = [round(rng.uniform(0.1, 0.46), 3) for _ in range(2)]
    first, second = (near, far) if goal in {"left", "above"} else (far, near)
    upright = goal in {"above", "below"}
    places = [(across[0], first), (across[1], second)] if upright else [(first, across[0]), (second, across[1])]
    things = (view(rng, shelf.of(["animal"])), view(rng, shelf.of(["vehicle"])))
    items = [Item(thing, *place, 0.42) for thing, place in zip(things, places, strict=True)]
    rng.shuffle(items)
    return Draft((scene(items),), "Where is the animal, seen from the vehicle?", RELATIONS, goal)


def motion(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """A9: three frames of one thing that moves or changes its size."""
    thing = view(rng, shelf.of(THINGS))
    along = [0.02, 0.3, 0.58]
    across = round(rng.uniform(0.1, 0.5), 3)
    scales = [0.3, 0.5, 0.75]
    if goal in {"left", "up", "smaller"}:
        along, scales = along[::-1], scales[::-1]
    frames: list[View] = []
    for step in range(3):
        if goal in {"larger", "smaller"}:
            margin = round((1 - scales[step]) / 2, 3)
            place = Place(margin, margin, scales[step])
        else:
            place = Place(along[step], across, 0.4) if goal in {"left", "right"} else Place(across, along[step], 0.4)
        frames.append(edited(thing, place))
    return Draft(
        tuple(frames), "The three frames follow each other. Which way does the thing move or change?", MOVES, goal
    )


def transition(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """A12: what was done to the first picture to get the second? Redrawn: another artist's drawing of the thing."""
    emoji = shelf.of(THINGS, ("google", "twitter", "fluent", "openmoji"))
    picture, redrawn = until(
        lambda: (rng.choice(emoji), rng.choice(emoji)),
        lambda two: two[0].concept == two[1].concept and two[0].domain != two[1].domain,
        "two drawings of one thing",
    )
    before = View(picture.path)
    if goal == "redrawn":
        after = View(redrawn.path)
    else:
        scale = round(rng.uniform(0.4, 0.6), 3)
        place = Place(round(rng.uniform(0, 1 - scale), 3), round(rng.uniform(0, 1 - scale), 3), scale)
        change: Edit = {
            "turned": Turn(rng.randint(1, 3)),
            "smaller": place,
            "coloured": Colourise(rng.choice(list(COLOURS.values()))),
        }[goal]
        after = edited(before, change)
    return Draft((before, after), "What was done to the thing from the first picture to the second?", CHANGES, goal)


def state(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """B4: in which state is the thing?"""
    thing = framed(rng, shelf.of(THINGS))
    if goal == "broken":
        thing = edited(
            thing, Break(rng.random() < 0.5, round(rng.uniform(0.06, 0.16), 3), round(rng.uniform(-0.15, 0.15), 3))
        )
    elif goal == "faded":
        thing = edited(thing, Contrast(round(rng.uniform(0.2, 0.45), 3)))
    elif goal == "dirty":
        discs = tuple(
            (round(rng.uniform(0.15, 0.85), 3), round(rng.uniform(0.15, 0.85), 3), round(rng.uniform(0.02, 0.06), 3))
            for _ in range(rng.randint(5, 9))
        )
        thing = edited(thing, Spots(discs, (rng.randint(80, 120), rng.randint(50, 80), rng.randint(20, 40))))
    return Draft((thing,), "In which state is the thing?", STATES, goal)


def instance(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """K15: four things, one in each corner, one of each kind; what is in the corner that the question names?"""
    corner = rng.choice(sorted(_QUARTERS))
    rest = [kind for kind in KINDS if kind != goal]
    rng.shuffle(rest)
    kinds = {corner: goal} | dict(zip([place for place in sorted(_QUARTERS) if place != corner], rest, strict=True))
    items = [Item(view(rng, shelf.of([kinds[place]])), *at, 0.46) for place, at in _QUARTERS.items()]
    return Draft((scene(items),), f"What is at the {corner}?", KINDS, goal)
