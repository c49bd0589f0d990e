"""Phrases and the things they stand for: similes, idioms, actions. Such a thing must be seen in training to be known
in the test, so its pictures are split by rendering: another artist's drawing of the same thing is tested.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

SIMILES: Mapping[str, str] = {
    "cunning": "fox",
    "brave": "lion",
    "wise": "owl",
    "slow": "snail",
    "proud": "peacock",
    "blind": "bat",
    "heavy": "elephant",
    "gentle": "sheep",
    "loyal": "dog",
    "quick": "rabbit",
    "light": "feather",
    "sour": "lemon",
    "hot": "fire",
    "sweet": "rose",
    "hungry": "wolf",
    "greedy": "pig",
    "loud": "trumpet",
    "stubborn": "donkey",
    "dry": "cactus",
    "tall": "giraffe",
    "talkative": "parrot",
    "early": "rooster",
    "curious": "cat",
    "pale": "ghost",
    "sharp": "razor",
    "grumpy": "bear",
}
"""Quality -> thing: "as cunning as a fox"."""

IDIOMS: Mapping[str, str] = {
    "a piece of": "cake",
    "spill the": "bean",
    "not my cup of": "tea",
    "work for": "peanut",
    "kick the": "bucket",
    "saved by the": "bell",
    "do it by the": "book",
    "burn at both ends like a": "candle",
    "head in the": "cloud",
    "climb the career": "ladder",
    "not exactly the science of a": "rocket",
    "drop a": "bomb",
    "chase the end of the": "rainbow",
    "the last straw that broke the back of the": "camel",
    "shed the tears of a": "crocodile",
    "hold your": "horse",
    "like water off the back of a": "duck",
    "weigh it down like an": "anchor",
    "go down like a lead": "balloon",
    "wind up like a": "watch",
}
"""Beginning of an idiom -> the thing that ends it."""

ACTIONS: Mapping[str, tuple[str, ...]] = {
    "run": ("running", "runner"),
    "walk": ("walking", "pedestrian"),
    "swim": ("swimming", "swimmer"),
    "surf": ("surfing", "surfer"),
    "climb": ("climbing", "climb"),
    "golf": ("golfing", "golf"),
    "row": ("rowing", "rowboat"),
    "cycle": ("biking", "bicyclist"),
    "juggle": ("juggling", "juggle"),
    "wrestle": ("wrestling", "wrestler"),
    "lift": ("lifting", "lift"),
    "dance": ("dancing", "dancer", "dance"),
    "cartwheel": ("cartwheeling", "cartwheel"),
}
"""Verb -> words of a concept that show it."""

_NOT_THE_ACTION = frozenset({"facing", "cane", "wheelchair", "ear", "shirt", "suit"})


@functools.cache
def subject_of(concept: str) -> str | None:
    """What a concept is split by, where that is not the concept itself: the thing of a phrase, or an action's verb.

    Example:
        >>> subject_of("fox"), subject_of("man running"), subject_of("zebra")
        ('fox', 'run', None)
    """
    if concept in _THINGS:
        return concept
    words = set(concept.split())
    if words & _NOT_THE_ACTION:
        return None
    return next((verb for verb, signs in ACTIONS.items() if words & set(signs)), None)


_THINGS = frozenset((*SIMILES.values(), *IDIOMS.values()))
