"""Kinds of pictures that only unseen tasks show: drawings in black lines, and playing cards."""

from __future__ import annotations

from pathlib import Path

from lightning_pfl.benchmark import drawings, sources
from lightning_pfl.benchmark.download import Report
from lightning_pfl.benchmark.images import Picture
from lightning_pfl.benchmark.packages import unpack

KINDS = ("animal", "vehicle", "clothing", "building", "tool", "plant")
"""Kinds of things that are shown as line drawings."""
IN_LINES = " in lines"
"""Ends the kind of a line drawing, so that no other task meets it."""

RANKS = {
    "2": "two",
    "3": "three",
    "4": "four",
    "5": "five",
    "6": "six",
    "7": "seven",
    "8": "eight",
    "9": "nine",
    "10": "ten",
}
SUITS = {"c": "clubs", "d": "diamonds", "h": "hearts", "s": "spades"}


def line_drawings(*, cache: Path | None = None, report: Report | None = None) -> list[Picture]:
    """OpenMoji's drawings without their colours; "animal/bird" becomes "animal in lines/bird"."""
    folder = unpack(sources.OPENMOJI_LINES, cache=cache, report=report) / "package/black/svg"
    found = []
    for picture in drawings.emoji(drawings.OPENMOJI, cache=cache, report=report):
        path = folder / picture.path.name
        if path.exists() and picture.kind in KINDS:
            kind, *rest = picture.category.split("/")
            category = "/".join([kind + IN_LINES, *rest])
            found.append(Picture(path, picture.concept, category, "line", picture.caption, picture.licence))
    return found


def playing_cards(*, cache: Path | None = None, report: Report | None = None) -> list[Picture]:
    """Open Clip Art's playing cards from two to ten, in up to four styles; a concept is a rank of a suit."""
    root = unpack(sources.OPENCLIPART, cache=cache, report=report) / "usr/share/openclipart/png/recreation/games/cards"
    found = []
    for path in sorted(root.glob("*/*.png")):
        _, *rest = path.stem.split("_")
        if len(rest) == 2 and rest[0] in SUITS and rest[1] in RANKS:
            name = f"{RANKS[rest[1]]} of {SUITS[rest[0]]}"
            concept = f"card {SUITS[rest[0]]} {RANKS[rest[1]]}"
            found.append(Picture(path, concept, "card", "card", name, sources.OPENCLIPART.licence))
    return found
