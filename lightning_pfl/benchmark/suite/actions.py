"""Tasks about what people do: B3, B9, B12. An action is tested in another artist's drawings."""

from __future__ import annotations

import random

from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.suite.library import Shelf
from lightning_pfl.benchmark.suite.named import ACTIONS
from lightning_pfl.benchmark.suite.picking import framed
from lightning_pfl.benchmark.suite.recipes import Draft, shuffled

VERBS = tuple(ACTIONS)


def _doing(rng: random.Random, shelf: Shelf, verb: str, count: int) -> list[View]:
    return [framed(rng, shelf.showing(verb)) for _ in range(count)]


def common(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """B3: what do the people in all three pictures do?"""
    others = rng.sample([verb for verb in VERBS if verb != goal], 3)
    images = tuple(_doing(rng, shelf, goal, 3))
    return Draft(images, "What do the people in all three pictures do?", shuffled(rng, [goal, *others]), goal)


def all_do(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """B9: do all three people do what the question names, or does one do something else?"""
    verb, other = rng.sample(VERBS, 2)
    verbs = [verb] * 3
    if goal == "no":
        verbs[rng.randrange(3)] = other
    images = tuple(_doing(rng, shelf, name, 1)[0] for name in verbs)
    return Draft(images, f"Do all three people {verb}?", ("yes", "no"), goal)


def query(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """B12: three people do one thing; does the fourth do it too?

    Neither the file nor its artist gives it away: the fourth picture is none of the three, and whatever the answer is,
    another artist drew it; or the same one, where no other artist's drawings of the action lie on this side.
    """
    verbs = [verb for verb in VERBS if len(shelf.showing(verb)) > 1]
    if not verbs:
        raise ValueError(f"The {shelf.split} side holds no two pictures of any action.")
    verb = rng.choice(verbs)
    shown = shelf.showing(verb)
    asked = rng.choice(shown)
    examples = [p for p in shown if p.domain != asked.domain] or [p for p in shown if p != asked]
    if goal == "negative":
        others = [p for other in VERBS if other != verb for p in shelf.showing(other)]
        asked = rng.choice([p for p in others if p.domain == asked.domain] or others)
    images = (*(framed(rng, examples) for _ in range(3)), framed(rng, [asked]))
    question = "The first three pictures show one action. Does the fourth show it (positive) or not (negative)?"
    return Draft(images, question, ("positive", "negative"), goal)
