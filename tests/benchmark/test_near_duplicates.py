"""Shifted, scaled, mirrored and recoloured copies are alike; other pictures are not."""

import random

import pytest
from PIL import Image, ImageOps

from lightning_pfl.benchmark.near_duplicates import alike


def _picture(seed):
    rng = random.Random(seed)
    small = Image.new("RGB", (6, 6))
    small.putdata([tuple(rng.randrange(220) for _ in range(3)) for _ in range(36)])
    return small.resize((60, 60), Image.Resampling.NEAREST)


def _shifted(image):
    canvas = Image.new("RGB", (100, 100), "white")
    canvas.paste(image.resize((48, 48)), (40, 10))
    return canvas


def _swapped(image):
    """Another hue, the same grey levels."""
    grey = image.convert("L")
    return Image.merge("RGB", (grey, grey, grey))


@pytest.mark.parametrize("change", [_shifted, ImageOps.mirror, _swapped, lambda image: image.resize((31, 31))])
def test_copies_are_found_across_groups_only(change):
    image = _picture(1)
    images = [image, _picture(2), change(image), _picture(3)]

    assert [(pair.first, pair.second) for pair in alike(images, [0, 0, 1, 1])] == [(0, 2)]
    assert alike(images, [0, 0, 0, 0]) == []
    assert [(pair.first, pair.second) for pair in alike(images, [1, 1, 0, 0])] == [(2, 0)]


def test_copies_are_found_wherever_they_stand_among_many(monkeypatch):
    """Three rows at a time: pairs within a block and across blocks, each once, as all at once gives them."""
    images = [_picture(seed) for seed in range(7)]
    images += [images[1].resize((31, 31)), ImageOps.mirror(images[5])]
    groups = [0] * 7 + [1, 2]
    at_once = alike(images, groups)
    monkeypatch.setattr("lightning_pfl.benchmark.near_duplicates._ROWS", 3)

    assert [(pair.first, pair.second) for pair in at_once] == [(1, 7), (5, 8)]
    assert [(pair.first, pair.second) for pair in alike(images, groups)] == [(1, 7), (5, 8)]


def test_nothing_to_compare():
    assert alike([], []) == []
