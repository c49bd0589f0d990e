"""Tasks that no client trains on: U1 to U3 show new kinds of pictures, U4 to U6 ask new kinds of questions."""

from __future__ import annotations

import random

from lightning_pfl.benchmark.composition import edited
from lightning_pfl.benchmark.edits import Crop
from lightning_pfl.benchmark.images import Picture, View
from lightning_pfl.benchmark.marks import Cover, Silhouette
from lightning_pfl.benchmark.suite.library import Shelf
from lightning_pfl.benchmark.suite.picking import different, framed, until
from lightning_pfl.benchmark.suite.rarities import IN_LINES, KINDS, RANKS, SUITS
from lightning_pfl.benchmark.suite.recipes import Draft

PATCHES = ("first", "second", "third")


def silhouette(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """U1: what kind of thing is this black shape?"""
    shown = edited(framed(rng, shelf.of([goal])), Silhouette())
    return Draft((shown,), "What kind of thing is this?", KINDS, goal)


def line_drawing(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """U2: what kind of thing is drawn in black lines?"""
    return Draft((framed(rng, shelf.of([goal + IN_LINES])),), "What kind of thing is this?", KINDS, goal)


def suit(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """U3: which suit has the playing card?"""
    cards = shelf.where(f"cards of {goal}", lambda picture: picture.kind == "card" and picture.caption.endswith(goal))
    question = "Which suit has the playing card?"
    return Draft((framed(rng, cards, mirror=False),), question, tuple(SUITS.values()), goal)


def card_duel(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """U4: which of two playing cards has at least three spots more?"""
    cards = shelf.of(["card"])
    pair = until(
        lambda: (rng.choice(cards), rng.choice(cards)),
        lambda two: (_spots(two[0]) - _spots(two[1])) * (1 if goal == "first" else -1) >= 3,
        "two playing cards that differ by three spots",
    )
    images = tuple(framed(rng, [card], mirror=False) for card in pair)
    return Draft(images, "Which playing card has the higher number?", ("first", "second"), goal)


def halves(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """U5: two halves of a photograph, the upper and the lower: in order or swapped?"""
    photograph = framed(rng, shelf.photographs())
    upper, lower = edited(photograph, Crop((0.0, 0.0, 1.0, 0.5))), edited(photograph, Crop((0.0, 0.5, 1.0, 1.0)))
    images = (upper, lower) if goal == "ordered" else (lower, upper)
    question = "Are these the upper and the lower half of a photo in this order (ordered), or swapped?"
    return Draft(images, question, ("ordered", "swapped"), goal)


def cloze(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """U6: a picture with a covered quarter, and three quarters: which one is missing?"""
    pictures = [View(p.path) for p in different(rng, shelf.of(["animal", "vehicle", "building", "plant"]), 3)]
    left, top = rng.choice(((0.1, 0.1), (0.5, 0.1), (0.1, 0.5), (0.5, 0.5)))
    box = (left, top, left + 0.4, top + 0.4)
    patches = [edited(picture, Crop(box)) for picture in pictures]
    whole = edited(pictures[0], Cover(box, (128, 128, 128)))
    right, *others = patches
    others.insert(PATCHES.index(goal), right)
    question = "Which of the three pieces after the first picture belongs into its grey hole?"
    return Draft((whole, *others), question, PATCHES, goal)


def _spots(card: Picture) -> int:
    """How many spots a playing card has, two to ten."""
    return 2 + list(RANKS.values()).index(card.caption.split()[0])
