"""Public data: named pictures that no task uses, in many versions, and questions that no task asks.

Projectors are pre-trained and models are aligned on these. Tasks ask about what edits do to a picture (blur, place,
number of copies), so public pictures go through the same kinds of edit, and their captions say so in passing, as
captions do: what never varies in public cannot be aligned, and what no caption mentions a projector does not carry.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_pfl.benchmark import drawings, photographs
from lightning_pfl.benchmark.edits import Blur, Brightness, Edit, Jpeg, Noise, Pixelate, Place, Repeat
from lightning_pfl.benchmark.images import Picture, View, of_split

__all__ = ["QUESTIONS", "Caption", "public_captions", "varied"]

QUESTIONS = (
    "What do you see here?",
    "Describe it in one word.",
    "Which group does it belong to?",
    "Name this.",
    "What comes to mind?",
    "Which word fits best?",
    "How would you label it?",
    "Sort this picture.",
    "What sort of picture is this?",
    "Pick a word.",
    "Which label is right?",
    "Say what this shows.",
)
"""What public pictures are asked; nothing is known of the answer."""


@dataclass(frozen=True)
class Caption:
    """A picture and what it shows, in a few words."""

    view: View
    name: str


def public_captions(*, cache: Path | None = None) -> list[Caption]:
    """Named pictures of the public split: emoji of four artists, Art4Apps, Tux Paint stamps.

    Raises:
        PackageUnavailableError: a package could not be fetched.
    """
    pictures: list[Picture] = []
    for domain in drawings.EMOJI_DOMAINS:
        pictures += [picture for picture in drawings.emoji(domain, cache=cache) if picture.kind != "flag"]
    pictures += drawings.art4apps(cache=cache) + photographs.stamps(cache=cache)
    return [Caption(View(picture.path), picture.concept) for picture in of_split(pictures, "public") if picture.concept]


def varied(captions: Sequence[Caption], versions: int, *, seed: int = 0) -> list[Caption]:
    """Every picture in several versions, each after one random edit or none, in a random order.

    Args:
        captions: named pictures.
        versions: how many of each.
        seed: of edits and order. What a picture becomes depends on the seed, its place in `captions` and the version.

    Returns:
        Captions that also say what the edit did ("blurry cat", "two cats" being "two cat").

    Example:
        >>> pictures = [Caption(View(Path(f"{name}.png")), name) for name in ("cat", "dog")]
        >>> [caption.name for caption in varied(pictures, versions=2)]
        ['blocky cat', 'blocky cat', 'clear dog', 'dim dog']
    """
    made = []
    for version in range(versions):
        for index, caption in enumerate(captions):
            rng = random.Random(f"{seed}/{version}/{index}")
            edits, words = rng.choice(_KINDS)(rng)
            view = replace(caption.view, edits=(*caption.view.edits, *edits))
            made.append(Caption(view, f"{words} {caption.name}"))
    random.Random(seed).shuffle(made)
    return made


_Edited = tuple[tuple[Edit, ...], str]
"""Edits and how a caption calls their effect."""


def _placed(rng: random.Random) -> _Edited:
    scale = rng.uniform(0.3, 0.45)
    x, y = rng.uniform(0, 1 - scale), rng.uniform(0, 1 - scale)
    across, down = x + scale / 2 - 0.5, y + scale / 2 - 0.5
    horizontal = "left" if across < 0 else "right"
    words = horizontal if abs(across) > abs(down) else "top" if down < 0 else "bottom"
    return (Place(x, y, scale),), words


def _repeated(rng: random.Random) -> _Edited:
    number = rng.randrange(1, 7)
    edit = Repeat(tuple(sorted(rng.sample(range(9), number))))
    return (edit,), ("one", "two", "three", "four", "five", "six")[number - 1]


_KINDS: tuple[Callable[[random.Random], _Edited], ...] = (
    lambda rng: ((), "clear"),
    lambda rng: ((Blur(rng.uniform(1, 5)),), "blurry"),
    lambda rng: ((Noise(rng.uniform(15, 70), seed=rng.randrange(2**31)),), "grainy"),
    lambda rng: ((Brightness(rng.uniform(0.3, 0.8)),), "dim"),
    lambda rng: ((Jpeg(rng.randrange(3, 15)),), "blocky"),
    lambda rng: ((Pixelate(rng.randrange(8, 24)),), "coarse"),
    _placed,
    _repeated,
)
