"""A client pulled towards a mixture keeps the rest of what it has."""

from dataclasses import replace

import pytest
import torch

from lightning_pfl.functional.pulling import Towards
from lightning_pfl.functional.relevance import Peers, Softmax, Uniform

PEERS = Peers.fresh(["a", "b", "c", "d"], num_examples=[1, 1, 1, 1])


def test_a_share_of_the_mixture_and_the_rest_of_ones_own():
    """By hand, a = 0.4 of a uniform row of four that counts the client: 0.6 + 0.1 for itself, 0.1 for each other."""
    rows = Towards(Uniform(include_self=True), share=0.4).rows(PEERS)

    expected = 0.6 * torch.eye(4, dtype=torch.float64) + 0.1
    torch.testing.assert_close(rows, expected)


def test_the_whole_share_is_the_policy_itself():
    policy = Uniform()
    assert torch.equal(Towards(policy, share=1.0).rows(PEERS), policy.rows(PEERS))


def test_it_needs_sketches_where_its_policy_does():
    assert Towards(Softmax()).needs_sketches
    assert not Towards(Uniform()).needs_sketches


def test_a_newcomer_takes_the_whole_mixture():
    """It has trained nothing that it could keep."""
    peers = replace(PEERS, newcomers=("d",))
    policy = Uniform(include_self=True)

    rows = Towards(policy, share=0.25).rows(peers)

    assert torch.equal(rows[3], policy.rows(peers)[3])
    assert rows[0, 0] > 0.75


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        Towards(share=share)
