"""Promises of `lightning_pfl.functional.privacy`."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pfl.functional.privacy import clip_rows, gaussian_noise, noise_context

KEY = bytes(range(32))


def test_clipping_cuts_long_rows_and_leaves_short_ones():
    """By hand: (3, 4) has norm 5 and is cut to (1.2, 1.6); (0, 1) stays to the bit."""
    rows = clip_rows(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), 2.0)

    torch.testing.assert_close(rows[0], torch.tensor([1.2, 1.6]))
    assert rows[1].tolist() == [0.0, 1.0]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=3, max_size=3),
    st.floats(1e-6, 1e6),
    st.integers(1, 2000),
)
def test_no_row_is_longer_than_the_bound_whatever_the_rounding(values, bound, copies):
    """Measured in float64: the sensitivity in the account is C, not C and a bit."""
    rows = torch.tensor([values * copies], dtype=torch.float32)

    assert clip_rows(rows, bound).double().norm().item() <= bound


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_without_a_norm_is_refused(value):
    """Zero times infinity would be sent as NaN, which no noise hides."""
    with pytest.raises(ValueError, match=r"Rows \[1\] hold NaN or infinity"):
        clip_rows(torch.tensor([[1.0, 2.0], [value, 0.0]]), 1.0)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_must_bound(bound):
    with pytest.raises(ValueError, match="max_norm"):
        clip_rows(torch.ones(1, 2), bound)


def test_noise_is_standard_normal():
    """100,000 numbers: moments, tails and both halves of Box and Muller's pairs."""
    noise = gaussian_noise(100_001, key=KEY, context=b"test")

    assert noise.shape == (100_001,)
    assert noise.dtype == torch.float64
    for half in (noise[:50_001], noise[50_001:]):
        assert abs(half.mean()) < 0.02
        assert abs(half.std() - 1) < 0.015
        assert abs((half**4).mean() - 3) < 0.25
    assert abs((noise > 1.959964).double().mean() - 0.025) < 0.002
    assert abs(torch.corrcoef(torch.stack([noise[:50_000], noise[50_001:]]))[0, 1]) < 0.02


def test_the_same_key_and_context_give_the_same_noise_and_nothing_else_does():
    """Every part of the context counts, and the parts cannot run into each other."""
    value = torch.tensor([1.0, 2.0], dtype=torch.float64)
    told = [("sketch", "a", 1, value), ("update", "a", 1, value), ("sketch", "b", 1, value), ("sketch", "a", 2, value)]
    told += [("sketch", "a", 1, value + 1e-15), ("sketch", "a", 11, value), ("sketch", "a1", 1, value)]
    told += [("sketcha", "", 1, value), ("sketch", "a", 1, value.float())]

    noises = [gaussian_noise(4, key=KEY, context=noise_context(*one)) for one in told]
    noises.append(gaussian_noise(4, key=KEY[::-1], context=noise_context(*told[0])))

    assert torch.equal(gaussian_noise(4, key=KEY, context=noise_context(*told[0])), noises[0])
    assert len({tuple(noise.tolist()) for noise in noises}) == len(noises)


def test_noise_neither_feels_nor_moves_the_random_numbers_of_the_training():
    """It runs in a client's turn."""
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    gaussian_noise(10, key=KEY, context=b"")

    assert torch.equal(torch.rand(2), expected)


def test_a_key_that_can_be_guessed_is_refused():
    with pytest.raises(ValueError, match="16 bytes"):
        gaussian_noise(3, key=b"secret", context=b"")
