"""B7: what would somebody with this face say?"""

from __future__ import annotations

import random

from lightning_pfl.benchmark.suite.library import Shelf
from lightning_pfl.benchmark.suite.picking import framed
from lightning_pfl.benchmark.suite.recipes import Draft, shuffled

LINES = {
    "happy": ("Hooray!", "Lovely!", "Great news!"),
    "sad": ("Sorry to hear that.", "Such a pity.", "It is all over."),
    "ill": ("My head hurts.", "Call a doctor.", "Please bring medicine."),
    "calm": ("Well then.", "All is quiet.", "No hurry."),
}
MOODS = tuple(LINES)


def line(rng: random.Random, goal: str, shelf: Shelf) -> Draft:
    """B7: one line of each mood; which fits the face?"""
    lines = {mood: rng.choice(LINES[mood]) for mood in MOODS}
    face = framed(rng, shelf.of([f"face/{goal}"]))
    choices = shuffled(rng, list(lines.values()))
    return Draft((face,), "What does somebody with this face say?", choices, lines[goal])
