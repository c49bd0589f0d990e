"""Pictures made of pictures: what lies where, and keys that do not depend on paths."""

import shutil

import pytest
from PIL import Image

from lightning_pfl.benchmark.composition import Item, Paste, edited, files_of, scene
from lightning_pfl.benchmark.edits import Turn
from lightning_pfl.benchmark.images import View


@pytest.fixture
def views(tmp_path):
    for name in ("red", "blue"):
        Image.new("RGB", (8, 8), name).save(tmp_path / f"{name}.png")
    return View(tmp_path / "red.png"), View(tmp_path / "blue.png")


def test_a_scene_puts_every_item_at_its_place_on_white(views):
    red, blue = views
    image = scene([Item(red, 0.0, 0.0, 0.25), Item(blue, 0.5, 0.5, 0.5)]).render(16)

    assert image.getpixel((1, 1)) == (255, 0, 0)
    assert image.getpixel((5, 5)) == (255, 255, 255)
    assert image.getpixel((9, 9)) == image.getpixel((15, 15)) == (0, 0, 255)
    with pytest.raises(ValueError, match="at least one item"):
        scene([])


def test_keys_follow_content_and_arrangement_but_not_paths(views, tmp_path):
    red, blue = views
    moved = tmp_path / "else" / "b.png"
    moved.parent.mkdir()
    shutil.copy(blue.path, moved)
    here, there = (edited(red, Paste(blue_at, 0.1, 0.2, 0.5)) for blue_at in (blue, View(moved)))

    assert here.key(16) == there.key(16)
    assert here.key(16) != edited(red, Paste(blue, 0.1, 0.3, 0.5)).key(16)
    assert here.key(16) != edited(red, Paste(edited(blue, Turn(1)), 0.1, 0.2, 0.5)).key(16)
    assert list(files_of(here)) == [red.path, blue.path]
