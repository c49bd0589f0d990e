"""Drawn pictures with names: emoji of four artists, Art4Apps illustrations, Open Clip Art.

Each function fetches its package when it is first called and lists the pictures in a fixed order.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_pfl.benchmark import sources
from lightning_pfl.benchmark.download import Report
from lightning_pfl.benchmark.images import Picture, normalise
from lightning_pfl.benchmark.packages import unpack
from lightning_pfl.benchmark.taxonomy import category_of, concept_of

GOOGLE, TWITTER, FLUENT, OPENMOJI = "google", "twitter", "fluent", "openmoji"
EMOJI_DOMAINS = (GOOGLE, TWITTER, FLUENT, OPENMOJI)

_SUBCATEGORIES: Mapping[str, str] = {
    "animal-mammal": "animal/mammal",
    "animal-bird": "animal/bird",
    "animal-marine": "animal/marine",
    "animal-bug": "animal/bug",
    "animal-reptile": "animal/reptile",
    "animal-amphibian": "animal/reptile",
    "food-fruit": "food/fruit",
    "food-vegetable": "food/vegetable",
    "food-sweet": "food/sweet",
    "food-prepared": "food/meal",
    "food-asian": "food/meal",
    "drink": "food/drink",
    "transport-ground": "vehicle/road",
    "transport-water": "vehicle/water",
    "transport-air": "vehicle/air",
    "clothing": "clothing",
    "tool": "tool",
    "musical-instrument": "instrument",
    "place-building": "building",
    "place-religious": "building",
    "sport": "sport",
    "plant-flower": "plant",
    "plant-other": "plant",
    "household": "household",
    "country-flag": "flag",
    "face-smiling": "face/happy",
    "face-affection": "face/happy",
    "face-tongue": "face/happy",
    "face-concerned": "face/sad",
    "face-negative": "face/angry",
    "face-unwell": "face/ill",
    "face-neutral-skeptical": "face/calm",
    "face-sleepy": "face/calm",
}
# Drawings whose subcategory says nothing about what is seen.
_MISPLACED = frozenset(
    (
        "aerial tramway",
        "anchor",
        "balance scale",
        "bowl with spoon",
        "broken chain",
        "bus stop",
        "chain",
        "construction sign",
        "cooking",
        "coral",
        "feather",
        "folding hand fan",
        "fuel pump",
        "gem stone",
        "hair pick",
        "honey pot",
        "hook",
        "horizontal traffic light",
        "link symbol",
        "lipstick",
        "microbe",
        "motorway",
        "mountain cableway",
        "octagonal sign",
        "oil drum",
        "parachute",
        "paw print",
        "pig nose",
        "police car revolving light",
        "prayer bead",
        "railway track",
        "ring",
        "ring buoy",
        "roller skate",
        "salt shaker",
        "seat",
        "shield",
        "shopping bag",
        "skateboard",
        "spider web",
        "spiral shell",
        "station",
        "suspension railway",
        "vertical traffic light",
        "wheel",
        "wing",
    )
)

_CLIPART: Mapping[str, str] = {
    "animals/bugs": "animal/bug",
    "animals/birds": "animal/bird",
    "animals/fish": "animal/marine",
    "animals/mammals": "animal/mammal",
    "food/fruit": "food/fruit",
    "food/vegetables": "food/vegetable",
    "food/desserts": "food/sweet",
    "food/beverages": "food/drink",
    "food/breads_and_carbs": "food/meal",
    "food/meats_and_eggs": "food/meal",
    "people/clothing": "clothing",
    "recreation/music": "instrument",
    "recreation/sports": "sport",
    "buildings/homes": "building",
    "plants": "plant",
    "tools": "tool",
}


def emoji(domain: str, *, cache: Path | None = None, report: Report | None = None) -> list[Picture]:
    """One artist's drawings of all emoji, in the order of the Unicode list.

    Args:
        domain: one of `EMOJI_DOMAINS`.
        cache: cache folder.
        report: progress callback of the downloads.

    Raises:
        ValueError: an unknown artist.
        PackageUnavailableError: a package could not be fetched.
    """
    table = unpack(sources.EMOJI_GOOGLE, cache=cache, report=report) / "package"
    if domain == GOOGLE:
        package, pattern = sources.EMOJI_GOOGLE, "package/img/google/64/{key}.png"
    elif domain == TWITTER:
        package, pattern = sources.EMOJI_TWITTER, "package/img/twitter/64/{key}.png"
    elif domain == FLUENT:
        package, pattern = sources.EMOJI_FLUENT, "package/assets/{key}.webp"
    elif domain == OPENMOJI:
        package, pattern = sources.OPENMOJI, "package/color/svg/{key}.svg"
    else:
        raise ValueError(f"`domain` must be one of {EMOJI_DOMAINS}, but is {domain!r}.")
    folder = unpack(package, cache=cache, report=report)
    rows = json.loads((table / "emoji.json").read_text(encoding="utf8"))
    rows.sort(key=lambda row: int(row["sort_order"]))
    return [
        Picture(path, concept_of(name), _emoji_category(row), domain, name, package.licence)
        for row in rows
        if (path := _drawing(folder, pattern, row["unified"])) is not None
        if (name := re.sub(r" flag$", "", row["name"].lower()))
    ]


def art4apps(*, cache: Path | None = None, report: Report | None = None) -> list[Picture]:
    """Illustrations on white; the file name is an English noun or verb."""
    folder = unpack(sources.ART4APPS, cache=cache, report=report)
    found = []
    for path in sorted(folder.rglob("art4apps/*/*.jpg")):
        concept = concept_of(path.stem)
        category = category_of(concept) or _ART4APPS.get(path.parent.name, "other")
        found.append(
            Picture(path, concept, category, "art4apps", path.stem.replace("_", " "), sources.ART4APPS.licence)
        )
    return found


_ART4APPS: Mapping[str, str] = {
    "clothes_n_accessories": "clothing",
    "construction": "building",
    "sport": "sport",
    "jobs": "person",
    "people": "person",
}


def openclipart(*, cache: Path | None = None, report: Report | None = None) -> list[Picture]:
    """Clip art by topic folder. File names are noisy, so the concept is only the first word of the name."""
    root = unpack(sources.OPENCLIPART, cache=cache, report=report) / "usr/share/openclipart/png"
    found = []
    for path in sorted(root.rglob("*.png")):
        if _num_pixels(path) > _MOST_PIXELS:
            continue
        topic = path.parent.relative_to(root).as_posix()
        words = normalise(path.stem).split()
        first = next((word for word in words if len(word) > 2 and word not in _NOISE), topic.rsplit("/", 1)[-1])
        concept = concept_of(first)
        category = next((_CLIPART[place] for place in _parents(topic) if place in _CLIPART), "other")
        found.append(Picture(path, concept, category, "openclipart", " ".join(words[:2]), sources.OPENCLIPART.licence))
    return found


_NOISE = frozenset({"architetto", "contour", "simple", "the", "francesco", "small", "big", "cartoon", "old"})


# A few files hold up to 600 million pixels, for print: they take seconds and gigabytes to open.
_MOST_PIXELS = 8_000_000


def _num_pixels(path: Path) -> int:
    """Width times height from a PNG's header, without decoding it."""
    with path.open("rb") as stream:
        header = stream.read(24)
    width, height = struct.unpack(">2I", header[16:24])
    return int(width) * int(height)


def _parents(topic: str) -> Iterator[str]:
    parts = topic.split("/")
    for count in range(len(parts), 0, -1):
        yield "/".join(parts[:count])


def _emoji_category(row: Mapping[str, Any]) -> str:
    if normalise(row["name"]) in _MISPLACED:
        return "other"
    return _SUBCATEGORIES.get(row["subcategory"], "other")


def _drawing(folder: Path, pattern: str, unified: str) -> Path | None:
    """File of an emoji: artists differ in letter case and in whether they keep the variation selector."""
    for code in (unified, unified.replace("-FE0F", "")):
        for key in (code.lower(), code):
            path = folder / pattern.format(key=key)
            if path.exists():
                return path
    return None
