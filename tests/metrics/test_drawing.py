"""Promises of `lightning_pfl.metrics.drawing`."""

import sys

import pytest
import torch

from lightning_pfl.metrics.drawing import draw_relevance

pytest.importorskip("matplotlib")


def picture(path):
    """The PNG as pixels, ``[height, width, channels]``."""
    from matplotlib.image import imread

    return torch.from_numpy(imread(path).copy())


@pytest.mark.parametrize("count", [1, 3, 17, 50])
def test_any_number_of_clients_is_drawn_in_a_size_that_a_screen_shows(count, tmp_path):
    """From one to fifty, at most 2000 pixels a side."""
    names = [f"client-{index}" for index in range(count)]
    path = draw_relevance(torch.rand(count, count), names, tmp_path / "new" / "matrix.png")

    height, width, _ = picture(path).shape
    assert 300 < height < 2000
    assert 300 < width < 2000


def test_other_weights_give_another_picture_and_equal_ones_the_same(tmp_path):
    """The cells show the numbers."""
    names = ["a", "b"]
    one = picture(draw_relevance(torch.eye(2), names, tmp_path / "one.png"))
    again = picture(draw_relevance(torch.eye(2), names, tmp_path / "again.png"))
    other = picture(draw_relevance(torch.eye(2).flip(0), names, tmp_path / "other.png"))

    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_similarities_with_negative_and_missing_values_are_drawn(tmp_path):
    """A client without a sketch has no cosine."""
    values = torch.tensor([[1.0, -0.5], [float("nan"), 1.0]])

    assert draw_relevance(values, ["a", "b"], tmp_path / "matrix.png").stat().st_size > 1000


def test_a_matrix_that_does_not_fit_the_names_is_refused(tmp_path):
    """The message gives both numbers."""
    with pytest.raises(ValueError, match=r"3, but the shape is \(2, 2\)"):
        draw_relevance(torch.eye(2), ["a", "b", "c"], tmp_path / "matrix.png")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    """It is an extra, and only who draws needs it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(ModuleNotFoundError, match=r"lightning-pfl\[benchmark\]"):
        draw_relevance(torch.eye(2), ["a", "b"], tmp_path / "matrix.png")
