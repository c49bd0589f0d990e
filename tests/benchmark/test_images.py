"""Pictures keep their concept on one side of a split, and views are functions of what they say."""

import pytest
from PIL import Image

from lightning_pfl.benchmark.edits import Turn
from lightning_pfl.benchmark.images import Picture, View, normalise, of_split, open_square, split_of


@pytest.fixture
def red_bar(tmp_path):
    """A 4 x 2 picture: red left half, transparent right half."""
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 2, 2))
    image.save(tmp_path / "bar.png")
    return tmp_path / "bar.png"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Leaning_Tower02.", "leaning tower"),
        ("polarBear", "polar bear"),
        ("some grapes", "grape"),
        ("glass", "glass"),
        ("octopus", "octopus"),
        ("tomatoes", "tomato"),
        ("ONCOMING BUS", "bus"),
        ("FACE", "face"),
    ],
)
def test_a_concept_has_one_spelling(name, expected):
    assert normalise(name) == expected


def test_other_spellings_of_a_concept_lie_on_the_same_side():
    for one, other in (("Dogs", "dog face"), ("A Polar Bear.", "polar_bear2"), ("tomatoes", "TOMATO")):
        assert split_of(one) == split_of(other)


def test_the_four_sides_have_about_the_shares_that_are_promised():
    sides = [
        split_of(f"{first}{second}{third}x")
        for first in "abcdefghij"
        for second in "klmnopqrst"
        for third in "uvwyzabcde"
    ]
    shares = {side: sides.count(side) / len(sides) for side in set(sides)}

    # by hand: 1/6; 5/6 of 7/20, 3/20, 10/20. One s.d. is about .015 at 1000 names.
    assert shares == pytest.approx({"public": 1 / 6, "test": 7 / 24, "val": 1 / 8, "train": 5 / 12}, abs=0.045)


def test_of_split_keeps_order_and_drops_the_other_sides(red_bar):
    names = ["dog", "owl", "fig", "cat", "bee"]
    pictures = [Picture(red_bar, name, "animal/x", "google", name, "MIT") for name in names]

    kept = [picture.concept for picture in of_split(pictures, split_of("owl"))]

    assert kept == [name for name in names if split_of(name) == split_of("owl")]
    assert (pictures[0].kind, pictures[0].sort) == ("animal", "x")


def test_a_picture_is_padded_with_white_to_a_square(red_bar):
    image = open_square(red_bar, 4)

    assert image.size == (4, 4)
    assert image.mode == "RGB"
    assert image.getpixel((0, 1)) == (255, 0, 0)  # the bar, in the middle rows
    assert image.getpixel((3, 1)) == (255, 255, 255)  # transparent is white
    assert image.getpixel((0, 0))[1] > 200  # padding above


def test_edits_are_applied_in_order_and_leave_the_shared_picture_alone(red_bar):
    before = open_square(red_bar, 4).tobytes()

    turned = View(red_bar, (Turn(1), Turn(1))).render(4)

    assert turned.getpixel((3, 2)) == (255, 0, 0)
    assert open_square(red_bar, 4).tobytes() == before


def test_the_key_changes_with_the_bytes_the_edits_and_the_size_only(red_bar, tmp_path):
    copy = tmp_path / "copy.png"
    copy.write_bytes(red_bar.read_bytes())
    other = tmp_path / "other.png"
    Image.new("RGB", (2, 2)).save(other)
    keys = [View(red_bar).key(4), View(red_bar, (Turn(1),)).key(4), View(red_bar).key(8), View(other).key(4)]

    assert View(copy).key(4) == keys[0]
    assert len(set(keys)) == 4


def test_a_truncated_picture_is_an_error_that_names_the_file(red_bar, tmp_path):
    (tmp_path / "half.png").write_bytes(red_bar.read_bytes()[:40])

    with pytest.raises(ValueError, match=r"half\.png cannot be read as an image"):
        open_square(tmp_path / "half.png", 8)
    with pytest.raises(FileNotFoundError):
        open_square(tmp_path / "none.png", 8)


def test_svg_is_rasterised(tmp_path):
    pytest.importorskip("resvg_py")
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2"><rect width="1" height="2" fill="#00f"/></svg>'
    (tmp_path / "x.svg").write_text(svg)

    image = open_square(tmp_path / "x.svg", 8)

    assert image.getpixel((1, 4)) == (0, 0, 255)
    assert image.getpixel((6, 4)) == (255, 255, 255)
