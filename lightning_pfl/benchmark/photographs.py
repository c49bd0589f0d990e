"""Real photographs with names: Tux Paint's stamps (cut out, on white) and GCompris' pictures (full scenes).

Each function fetches its package when it is first called and lists the pictures in a fixed order.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from lightning_pfl.benchmark import sources
from lightning_pfl.benchmark.download import Report
from lightning_pfl.benchmark.images import Picture
from lightning_pfl.benchmark.packages import cache_dir, unpack
from lightning_pfl.benchmark.rcc import read_rcc
from lightning_pfl.benchmark.taxonomy import category_of, concept_of

_STAMPS: Mapping[str, str] = {
    "animals/mammals/aquatic": "animal/marine",
    "animals/mammals": "animal/mammal",
    "animals/marsupials": "animal/mammal",
    "animals/birds": "animal/bird",
    "animals/fish": "animal/marine",
    "animals/shellfish": "animal/marine",
    "animals/insects": "animal/bug",
    "animals/amphibians": "animal/reptile",
    "animals/lizards": "animal/reptile",
    "food/fruit": "food/fruit",
    "food/vegetables": "food/vegetable",
    "food/dessert": "food/sweet",
    "household/tools": "tool",
    "hobbies/music": "instrument",
    "plants": "plant",
    "clothes": "clothing",
    "military/vehicles": "vehicle",
    "vehicles": "vehicle",
}
_DRAWN = ("cartoon", "symbols", "seasonal", "roadsigns", "flags", "houses", "toys", "plastic", "_mirror", "_flip")

_SCENES: Mapping[str, str] = {
    "categorization/resource/images/fishes": "animal/marine",
    "categorization/resource/images/monuments": "building",
    "categorization/resource/images/renewable": "energy",
    "categorization/resource/images/tools": "tool",
    "categorization/resource/images/others": "other",
    "explore_monuments/resource": "building",
    "explore_world_animals/resource": "animal",
    "explore_farm_animals/resource": "animal",
    "erase/resource": "animal",
}


def stamps(*, cache: Path | None = None, report: Report | None = None) -> list[Picture]:
    """Tux Paint's photographic stamps: the folder is a taxonomy, a text file beside each holds its caption."""
    root = unpack(sources.TUXPAINT_STAMPS, cache=cache, report=report) / "usr/share/tuxpaint/stamps"
    found = []
    for path in sorted(root.rglob("*.png")):
        place = path.relative_to(root).as_posix()
        text = path.with_suffix(".txt")
        if any(word in place for word in _DRAWN) or not text.exists():
            continue
        caption = text.read_text(encoding="utf8", errors="replace").splitlines()[0].strip().rstrip(".!").lower()
        if len(caption.split()) > 6:  # a sentence, not a name
            caption = path.stem.replace("_", " ").replace("-", " ").lower()
        concept = concept_of(caption)
        category = next((_STAMPS[top] for top in _tops(place) if top in _STAMPS), "other")
        found.append(Picture(path, concept, category, "stamp", caption, sources.TUXPAINT_STAMPS.licence))
    return found


def scenes(*, cache: Path | None = None, report: Report | None = None) -> list[Picture]:
    """GCompris' photographs of animals, monuments, tools and power plants, unpacked from Qt resource files once."""
    root = _unpacked_scenes(cache, report)
    found = []
    for path in sorted(root.rglob("*.webp")):
        place = path.relative_to(root).as_posix()
        category = next((_SCENES[top] for top in _tops(place) if top in _SCENES), "other")
        concept = concept_of(path.stem)
        if category == "animal":
            category = category_of(concept) or "other"
        found.append(Picture(path, concept, category, "scene", concept, sources.GCOMPRIS.licence))
    return found


def _unpacked_scenes(cache: Path | None, report: Report | None) -> Path:
    packed = unpack(sources.GCOMPRIS, cache=cache, report=report)
    folder = (cache or cache_dir()) / "unpacked" / f"gcompris-photographs-{sources.GCOMPRIS.sha256[:12]}"
    if folder.is_dir():
        return folder
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return folder
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for archive in sorted(packed.rglob("*.rcc")):
            for name, content in read_rcc(archive):
                place = name.removeprefix("gcompris/src/activities/")
                if name.endswith(".webp") and ".." not in name and any(top in _SCENES for top in _tops(place)):
                    target = partial / place
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content)
        os.replace(partial, folder)
    return folder


def _tops(place: str) -> list[str]:
    """The folders above a file, the longest first."""
    parts = place.split("/")[:-1]
    return ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
