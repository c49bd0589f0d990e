"""Each edit does what its name says, on a picture small enough to work out by hand."""

import numpy as np
import pytest
from PIL import Image

from lightning_pfl.benchmark.edits import (
    Blur,
    Brightness,
    Contrast,
    Crop,
    Jpeg,
    Mark,
    Noise,
    Pixelate,
    Place,
    Repeat,
    Tint,
    Turn,
)


def _image(pixels):
    return Image.fromarray(np.array(pixels, dtype=np.uint8))


BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (255, 0, 0)
CHECKED = Image.new("RGB", (48, 48), (90, 90, 90))
CHECKED.paste((200, 200, 200), (0, 0, 24, 24))

EDITS = [
    Blur(1.0),
    Brightness(0.5),
    Contrast(0.5),
    Crop((0.0, 0.0, 0.5, 0.5)),
    Jpeg(5),
    Mark(3, 0.5, 0.5, 0.3, RED),
    Noise(9.0, 1),
    Pixelate(5),
    Place(0.0, 0.5, 0.5),
    Repeat((0, 8)),
    Tint(RED, 0.3),
    Turn(1),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: type(edit).__name__)
def test_an_edit_changes_a_copy_in_the_same_way_every_time(edit):
    before = CHECKED.tobytes()

    first, second = edit.apply(CHECKED), edit.apply(CHECKED)

    assert first.size == CHECKED.size
    assert first.mode == "RGB"
    assert first.tobytes() == second.tobytes() != before
    assert CHECKED.tobytes() == before


def test_a_quarter_turn_is_counter_clockwise_after_the_mirror():
    image = _image([[RED, WHITE], [BLACK, BLACK]])

    assert np.array_equal(np.asarray(Turn(1).apply(image)), [[WHITE, BLACK], [RED, BLACK]])
    assert np.array_equal(np.asarray(Turn(0, mirror=True).apply(image)), [[WHITE, RED], [BLACK, BLACK]])


def test_noise_has_the_spread_and_the_seed_that_it_says():
    grey = Image.new("RGB", (64, 64), (128, 128, 128))

    change = np.asarray(Noise(10.0, seed=3).apply(grey), dtype=float) - 128

    assert change.std() == pytest.approx(10.0, rel=0.05)
    assert Noise(10.0, seed=4).apply(grey).tobytes() != Noise(10.0, seed=3).apply(grey).tobytes()


def test_brightness_and_tint_are_linear():
    grey = Image.new("RGB", (2, 2), (100, 100, 100))

    assert Brightness(0.5).apply(grey).getpixel((0, 0)) == (50, 50, 50)
    assert Tint((200, 0, 100), 0.5).apply(grey).getpixel((0, 0)) == (150, 50, 100)


def test_place_puts_the_small_picture_where_it_says():
    red = Image.new("RGB", (8, 8), RED)

    placed = np.asarray(Place(x=0.5, y=0.0, scale=0.5).apply(red))

    expected = np.full((8, 8, 3), 255)
    expected[0:4, 4:8] = RED
    assert np.array_equal(placed, expected)


def test_repeat_fills_the_cells_it_names():
    red = Image.new("RGB", (9, 9), RED)

    repeated = np.asarray(Repeat((0, 5)).apply(red))

    centres = [tuple(repeated[3 * row + 1, 3 * column + 1]) for row in range(3) for column in range(3)]
    assert [index for index, colour in enumerate(centres) if colour == RED] == [0, 5]


def test_a_mark_is_an_outline():
    for corners in (0, 3, 4):
        marked = np.asarray(Mark(corners, 0.5, 0.5, 0.4, RED).apply(Image.new("RGB", (48, 48), WHITE)))
        is_red = (marked == RED).all(axis=2)
        assert is_red.any()
        assert not is_red[24, 24]
        assert not is_red[0].any()


def test_crop_scales_the_box_to_the_whole():
    image = _image([[RED, RED, WHITE, WHITE]] * 4)

    assert np.array_equal(
        np.asarray(Crop((0.0, 0.0, 0.5, 1.0)).apply(image)), np.asarray(Image.new("RGB", (4, 4), RED))
    )


def test_pixelate_averages_blocks():
    image = _image([[BLACK, WHITE], [WHITE, BLACK]])

    assert Pixelate(1).apply(image).getpixel((0, 0)) == (128, 128, 128)
