"""Each mark changes what it says, where it says, and leaves its argument alone."""

import pytest
from PIL import Image, ImageChops

from lightning_pfl.benchmark.marks import Bars, Break, Colourise, Cover, Dial, Scratch, Silhouette, Spots

RED, GREEN = (255, 0, 0), (0, 255, 0)


@pytest.fixture
def grey():
    image = Image.new("RGB", (64, 64), "white")
    image.paste((90, 90, 90), (16, 16, 48, 48))
    return image


@pytest.mark.parametrize(
    "mark",
    [
        Colourise(RED),
        Silhouette(RED),
        Scratch(((0.1, 0.1), (0.9, 0.9)), RED, 0.05),
        Spots(((0.5, 0.5, 0.1),), RED),
        Break(True, 0.2, 0.1),
        Cover((0.0, 0.0, 0.5, 0.5), RED),
        Dial(180, RED),
        Bars((0.2, 1.0), (RED, GREEN)),
    ],
    ids=lambda mark: type(mark).__name__,
)
def test_marks_are_pure(grey, mark):
    before = grey.tobytes()
    first, second = mark.apply(grey), mark.apply(grey)

    assert grey.tobytes() == before
    assert first.tobytes() == second.tobytes()
    assert first.size == grey.size
    assert ImageChops.difference(first, grey).getbbox() is not None


def test_colours_and_places(grey):
    assert Silhouette(RED).apply(grey).getpixel((32, 32)) == RED
    assert Silhouette(RED).apply(grey).getpixel((2, 2)) == (255, 255, 255)
    red, green, _ = Colourise((200, 30, 30)).apply(grey).getpixel((32, 32))
    assert red > green + 30
    assert Cover((0.5, 0.5, 1.0, 1.0), RED).apply(grey).getpixel((60, 60)) == RED
    assert Spots(((0.25, 0.75, 0.1),), RED).apply(grey).getpixel((16, 48)) == RED
    assert Scratch(((0.0, 0.5), (1.0, 0.5)), RED, 0.05).apply(grey).getpixel((10, 32)) == RED


def test_a_break_opens_a_white_gap_along_its_cut(grey):
    upright = Break(True, 0.25, 0.0).apply(grey)
    lying = Break(False, 0.25, 0.0).apply(grey)

    assert upright.getpixel((34, 32)) == (255, 255, 255)
    assert upright.getpixel((20, 32)) == (90, 90, 90)
    assert lying.getpixel((32, 34)) == (255, 255, 255)


@pytest.mark.parametrize(("minutes", "point"), [(0, (32, 20)), (180, (44, 32)), (360, (32, 44)), (540, (20, 32))])
def test_the_hour_hand_points_to_the_hour(minutes, point):
    dial = Dial(minutes, RED).apply(Image.new("RGB", (64, 64), "white"))

    assert dial.getpixel(point) == RED


def test_bars_are_as_high_as_said():
    chart = Bars((0.5, 1.0), (RED, GREEN)).apply(Image.new("RGB", (160, 160), "white"))
    heights = [sum(chart.getpixel((x, y)) == colour for y in range(160)) for x, colour in ((45, RED), (115, GREEN))]

    assert heights[1] == pytest.approx(2 * heights[0], abs=3)
