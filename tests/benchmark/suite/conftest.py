"""A little library of drawn pictures that has everything the suite's tasks ask for; nothing is downloaded."""

from __future__ import annotations

import random

import pytest
from PIL import Image, ImageDraw

from lightning_pfl.benchmark.images import Picture, split_of
from lightning_pfl.benchmark.suite import flags, rarities
from lightning_pfl.benchmark.suite.library import Library
from lightning_pfl.benchmark.suite.named import ACTIONS, IDIOMS, SIMILES

ARTISTS = ("google", "twitter", "fluent", "openmoji")
KINDS = (
    "animal/mammal animal/bird animal/marine animal/bug vehicle/road building plant tool instrument household sport "
    "face/happy face/sad face/ill face/calm food/fruit food/vegetable food/sweet food/drink food/meal"
)
NEEDED = {"train": 5, "val": 4, "test": 5, "public": 1}
SYLLABLES = [first + vowel for first in "bdfgklmnprtvz" for vowel in "aeio"]


def _draw(path, seed):
    """A picture that looks like no other: sixteen coloured squares."""
    rng = random.Random(seed)
    image = Image.new("RGB", (16, 16), "white")
    draw = ImageDraw.Draw(image)
    for cell in range(16):
        colour = tuple(rng.randrange(256) for _ in range(3))
        draw.rectangle((cell % 4 * 4, cell // 4 * 4, cell % 4 * 4 + 3, cell // 4 * 4 + 3), fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    made = []

    def add(concept, category, domain, stem=None, licence="MIT"):
        path = root / domain / f"{stem or concept.replace(' ', '_')}.png"
        _draw(path, f"{domain}/{concept}")
        made.append(Picture(path, concept, category, domain, concept, licence))

    spare = {side: [] for side in NEEDED}
    for first in SYLLABLES:
        for second in SYLLABLES:
            spare[split_of(f"{first}{second}o")].append(f"{first}{second}o")

    def names(times=1):
        return [spare[side].pop() for side, count in NEEDED.items() for _ in range(times * count)]

    for category in KINDS.split():
        for concept in names():
            for artist in ARTISTS:
                add(concept, category, artist)
            if category.split("/")[0] in {"animal", "food"}:
                add(concept, category, "stamp", licence="GPL-2.0-or-later")
    for word in ("hat", "shoe", "shirt"):
        for concept in (f"{name} {word}" for name in sorted(n for side in spare.values() for n in side)[:40]):
            for artist in ARTISTS[:2]:
                add(concept, "clothing", artist)
    for concept in names(2):
        add(concept, "other", "scene", licence="CC-BY-SA-4.0")
    people = ("man", "woman", "child", "clown", "nurse")
    actions = [
        f"{who} {words[0]}"
        for words in ACTIONS.values()
        for who in [who for who in people if split_of(f"{who} {words[0]}") != "public"][:2]
    ]
    for subject in (*SIMILES.values(), *IDIOMS.values(), *actions):
        for artist in ARTISTS:
            add(subject, "other", artist)
    for place, codes in flags._CONTINENTS.items():
        for layout in flags.LAYOUTS:
            alike = [code for code in codes.split() if flags._LAYOUT.get(code, "other") == layout]
            for index, code in enumerate(alike):
                stem = "-".join(f"1f1{ord(letter) - ord('A') + 0xE6:02x}" for letter in code)
                concept = spare[("test", "train", "val")[(index + len(place)) % 3]].pop()
                for artist in ARTISTS[:2]:
                    add(concept, "flag", artist, stem=stem)
    for kind in rarities.KINDS:
        for concept in names():
            add(concept, kind + rarities.IN_LINES, "line")
    for suit in rarities.SUITS.values():
        for rank in rarities.RANKS.values():
            path = root / "card" / f"{rank}_{suit}.png"
            _draw(path, f"{rank}/{suit}")
            made.append(Picture(path, f"card {suit} {rank}", "card", "card", f"{rank} of {suit}", "CC-PDDC"))
    return made


@pytest.fixture(scope="session")
def library(pictures):
    return Library(pictures, doubles=frozenset())
