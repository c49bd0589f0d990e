"""Photographs get their concepts from captions and file names, their classes from folders."""

import pytest
from PIL import Image

from lightning_pfl.benchmark import photographs, sources


@pytest.fixture
def packages(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "unpack", lambda package, **_: tmp_path / package.name)
    return tmp_path


def test_stamps_take_captions_and_leave_drawings_out(packages):
    root = packages / sources.TUXPAINT_STAMPS.name / "usr/share/tuxpaint/stamps"
    captions = {
        "animals/birds/hen": "A brown hen.\nde.utf8=Eine Henne.\n",
        "animals/mammals/aquatic/orca": "An orca.",
        "animals/mammals/bears/cartoon/bear": "A bear.",
        "household/rubber_duck": "Look at this yellow duck, it swims in the bath!",
        "food/fruit/plum": "Some plums.",
    }
    for place, caption in captions.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(root / f"{place}.png")
        (root / f"{place}.txt").write_text(caption)
    Image.new("RGB", (2, 2)).save(root / "food/nameless.png")

    found = [(one.concept, one.category, one.domain) for one in photographs.stamps()]

    assert found == [
        ("hen", "animal/bird", "stamp"),
        ("orca", "animal/marine", "stamp"),
        ("plum", "food/fruit", "stamp"),
        ("duck", "other", "stamp"),
    ]


def test_scenes_are_unpacked_once_from_resource_files(packages, monkeypatch):
    (packages / sources.GCOMPRIS.name).mkdir()
    (packages / sources.GCOMPRIS.name / "a.rcc").write_bytes(b"")
    reads = []

    def read(path):
        reads.append(path.name)
        prefix = "gcompris/src/activities/"
        yield prefix + "explore_world_animals/resource/animals/polar_bear.webp", b"1"
        yield prefix + "explore_world_animals/resource/animals/alpaca_dance.webp", b"2"
        yield prefix + "categorization/resource/images/tools/hammer3.webp", b"3"
        yield prefix + "lang/resource/words_sample/six.webp", b"4"
        yield prefix + "explore_world_animals/resource/animals/../../../../evil.webp", b"5"

    monkeypatch.setattr(photographs, "read_rcc", read)

    first, again = (photographs.scenes(cache=packages) for _ in range(2))

    assert first == again
    assert [(one.concept, one.category) for one in first] == [
        ("hammer", "tool"),
        ("alpaca dance", "other"),
        ("bear", "animal/mammal"),
    ]
    assert reads == ["a.rcc"]
    assert not list(packages.rglob("evil*"))


@pytest.mark.assets
def test_the_real_collections_are_as_large_as_they_were():
    assert len(photographs.stamps()) > 300
    assert len(photographs.scenes()) > 200
