"""Drawn pictures get concept, category, domain and licence from their packages' tables and folders."""

import json
import struct

import pytest
from PIL import Image

from lightning_pfl.benchmark import drawings, sources


def _png(path, size=(2, 2)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Folder of each package, empty, in place of the real ones."""
    monkeypatch.setattr(drawings, "unpack", lambda package, **_: tmp_path / package.name)
    return tmp_path


def _row(unified, name, subcategory, order):
    return {"unified": unified, "name": name, "subcategory": subcategory, "sort_order": order}


@pytest.fixture
def emoji(packages):
    rows = [
        _row("1F426", "BIRD", "animal-bird", 2),
        _row("2708-FE0F", "AIRPLANE", "transport-air", 3),
        _row("1F408-200D-2B1B", "BLACK CAT", "animal-mammal", 1),
        _row("1F43E", "PAW PRINTS", "animal-mammal", 4),
    ]
    google = packages / "emoji-datasource-google/package"
    google.mkdir(parents=True)
    (google / "emoji.json").write_text(json.dumps(rows))
    for name in ("1f426", "2708-fe0f", "1f408-200d-2b1b", "1f43e"):
        _png(google / f"img/google/64/{name}.png")
    _png(packages / "@lobehub/fluent-emoji-3d/package/assets/2708.webp")
    for name in ("1F426", "2708"):
        path = packages / f"openmoji/package/color/svg/{name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("<svg/>")
    return packages


def test_emoji_come_in_the_order_of_the_list_with_names_and_categories(emoji):
    found = drawings.emoji("google")

    assert [(one.concept, one.category, one.caption) for one in found] == [
        ("cat", "animal/mammal", "black cat"),
        ("bird", "animal/bird", "bird"),
        ("airplane", "vehicle/air", "airplane"),
        ("paw print", "other", "paw prints"),
    ]
    assert {(one.domain, one.licence) for one in found} == {("google", "Apache-2.0")}


def test_artists_who_name_their_files_otherwise_are_found(emoji):
    assert [one.concept for one in drawings.emoji("fluent")] == ["airplane"]
    assert [one.concept for one in drawings.emoji("openmoji")] == ["bird", "airplane"]
    assert drawings.emoji("twitter") == []


def test_an_unknown_artist_is_refused(emoji):
    with pytest.raises(ValueError, match=r"must be one of .*'fluent'.*, but is 'apple'"):
        drawings.emoji("apple")


def test_art4apps_are_classed_by_noun_then_by_folder(packages):
    root = packages / sources.ART4APPS.name / "usr/share/art4apps"
    for name in ("animals/baby_rabbit", "fruit_n_veg/tomato", "clothes_n_accessories/tie", "actions/eat"):
        _png(root / f"{name}.jpg")

    found = {one.caption: (one.concept, one.category) for one in drawings.art4apps()}

    assert found == {
        "baby rabbit": ("rabbit", "animal/mammal"),
        "tomato": ("tomato", "food/vegetable"),
        "tie": ("tie", "clothing"),
        "eat": ("eat", "other"),
    }


def test_clip_art_is_classed_by_topic_and_files_for_print_are_left_out(packages):
    root = packages / sources.OPENCLIPART.name / "usr/share/openclipart/png"
    for name in ("animals/mammals/dogs/dog_01_drawn_02", "animals/fantasy/unicorn", "plants/trees/oak_ganson"):
        _png(root / f"{name}.png")
    huge = bytearray((root / "animals/fantasy/unicorn.png").read_bytes())
    huge[16:24] = struct.pack(">2I", 20_000, 20_000)
    (root / "plants/huge.png").write_bytes(huge)

    found = [(one.concept, one.category) for one in drawings.openclipart()]

    assert found == [("unicorn", "other"), ("dog", "animal/mammal"), ("oak", "plant")]
