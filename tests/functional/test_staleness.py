"""Promises of `lightning_pfl.functional.staleness`: what is old counts less."""

import pytest
import torch

from lightning_pfl.functional.relevance import Peers, TopK, Uniform
from lightning_pfl.functional.staleness import Fading, staleness_weight


@pytest.mark.parametrize(("rounds", "exponent", "weight"), [(0, 0.5, 1.0), (3, 0.5, 0.5), (8, 1.0, 1 / 9), (7, 0.0, 1)])
def test_a_weight_falls_with_the_rounds(rounds, exponent, weight):
    assert staleness_weight(rounds, exponent) == pytest.approx(weight)


@pytest.mark.parametrize("arguments", [(-1, 0.5), (1, -0.5), (1, float("nan"))])
def test_negative_numbers_are_refused(arguments):
    with pytest.raises(ValueError, match="must not be negative"):
        staleness_weight(*arguments)


def test_a_row_fades_with_the_others_ages_but_not_with_its_own():
    """Ages 8, 0, 3 under exponent 1/2 weigh 1/3, 1, 1/2; in its own row, who is 8 rounds old counts fully."""
    peers = Peers(("a", "b", "c"), (1, 1, 1), (True,) * 3, ages=(8, 0, 3))

    rows = Fading(Uniform(include_self=True)).rows(peers)

    expected = torch.tensor([[1, 1, 1 / 2], [1 / 3, 1, 1 / 2], [1 / 3, 1, 1]], dtype=torch.float64)
    torch.testing.assert_close(rows, expected / expected.sum(1, keepdim=True))


def test_who_is_alone_keeps_its_own():
    peers = Peers(("a", "b"), (1, 1), (False, False), ages=(5, 5))
    assert torch.equal(Fading(Uniform()).rows(peers), torch.eye(2, dtype=torch.float64))


def test_the_other_policy_says_whether_sketches_are_needed():
    assert Fading().needs_sketches
    assert not Fading(Uniform()).needs_sketches
    assert Fading(TopK(1)).needs_sketches
