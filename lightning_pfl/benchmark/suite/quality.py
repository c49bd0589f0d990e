"""Tasks about the quality of photographs: B1, K3, K8, K9, K14."""

from __future__ import annotations

import random

from lightning_pfl.benchmark.composition import edited
from lightning_pfl.benchmark.edits import Blur, Brightness, Crop, Edit, Jpeg, Noise, Turn
from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.suite.library import Shelf
from lightning_pfl.benchmark.suite.picking import framed
from lightning_pfl.benchmark.suite.recipes import Draft

PROBLEMS = ("fine", "blurry", "dark", "cropped", "upside")
DEFECTS = ("clean", "blurry", "noisy", "dark", "compressed")
VERSIONS = ("first", "second", "third")


def _photograph(rng: random.Random, shelf: Shelf, *, mirror: bool = True) -> View:
    return framed(rng, shelf.photographs(), mirror=mirror)


def _worse(rng: random.Random, what: str, degree: float) -> tuple[Edit, ...]:
    """A defect from degree 0 (hardly any) to 4."""
    return {
        "clean": lambda: (),
        "blurry": lambda: (Blur(round(0.3 + 0.5 * degree, 3)),),
        "noisy": lambda: (Noise(round(5.0 * degree, 3), rng.randrange(10**6)),),
        "dark": lambda: (Brightness(round(1 - 0.14 * degree, 3)),),
        "compressed": lambda: (Jpeg(max(4, round(34 - 8 * degree))),),
    }[what]()


def problem(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """B1: what is wrong with a photograph somebody took without seeing?"""
    photograph = _photograph(rng, shelf)
    corner = rng.choice(((0.0, 0.0), (0.55, 0.0), (0.0, 0.55), (0.55, 0.55)))
    edits: tuple[Edit, ...] = {
        "fine": (),
        "blurry": (Blur(round(rng.uniform(1.5, 3.0), 3)),),
        "dark": (Brightness(round(rng.uniform(0.2, 0.5), 3)),),
        "cropped": (Crop((*corner, corner[0] + 0.45, corner[1] + 0.45)),),
        "upside": (Turn(2),),
    }[goal]
    question = "What is wrong with the photo? (upside: it is upside down)"
    return Draft((edited(photograph, *edits),), question, PROBLEMS, goal)


def better(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """K3: which of two photographs is better? They have one defect in two degrees, two to three apart."""
    what, least = rng.choice(DEFECTS[1:]), rng.uniform(0.2, 1.0)
    good, bad = (
        edited(_photograph(rng, shelf), *_worse(rng, what, degree)) for degree in (least, least + rng.uniform(2, 3))
    )
    images = (good, bad) if goal == "first" else (bad, good)
    return Draft(images, "Which picture has the better quality?", ("first", "second"), goal)


def blurred(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """K8: is the photograph blurred? If not, it may have another defect."""
    what = "blurry" if goal == "yes" else rng.choice(("clean", "noisy", "dark", "compressed"))
    shown = edited(_photograph(rng, shelf), *_worse(rng, what, rng.uniform(1.5, 4)))
    return Draft((shown,), "Is this photo blurred?", ("yes", "no"), goal)


def defect(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """K9: which defect has the photograph?"""
    shown = edited(_photograph(rng, shelf), *_worse(rng, goal, rng.uniform(1.5, 3.5)))
    return Draft((shown,), "What is the quality problem of this photo?", DEFECTS, goal)


def best(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """K14: which of three versions of a photograph is best? They have one defect in three degrees, about one apart."""
    photograph = _photograph(rng, shelf)
    what, degrees = rng.choice(DEFECTS[1:]), [rng.uniform(0.3, 1.2)]
    for _ in range(2):
        degrees.append(degrees[-1] + rng.uniform(0.8, 1.2))
    least, *others = (edited(photograph, *_worse(rng, what, degree)) for degree in degrees)
    rng.shuffle(others)
    others.insert(VERSIONS.index(goal), least)
    return Draft(tuple(others), "Which picture has the best quality?", VERSIONS, goal)
