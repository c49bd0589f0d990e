"""What FLoRA's server adds up: products of any rank, exactly."""

import torch

from lightning_pfl.aggregation import Stacking
from lightning_pfl.types import ClientUpdate, FlatTensors, SharedTensors

WIDTH_IN, WIDTH_OUT = 7, 5


def update(client, round, rank, *, num_examples, p=0.0, extra=0.0):
    generator = torch.Generator().manual_seed(10 * round + num_examples)
    bound = {
        "0.A": torch.randn(rank, WIDTH_IN, generator=generator),
        "0.B": torch.randn(WIDTH_OUT, rank, generator=generator),
        "0.bias": torch.tensor([extra]),
    }
    shared = SharedTensors(FlatTensors.pack({"P": torch.tensor([p])}), FlatTensors.pack(bound))
    return ClientUpdate(client, round, num_examples, "one", shared)


def product(shared):
    tensors = shared.same_architecture.unpack()
    return tensors["0.B"] @ tensors["0.A"]


def test_the_sum_over_rounds_of_means_over_clients_is_kept_whatever_the_rank():
    rule, state, expected = Stacking(), {}, torch.zeros(WIDTH_OUT, WIDTH_IN)
    for round in range(4):
        updates = [
            update("a", round, 2, num_examples=1, p=1.0),
            update("b", round, 2, num_examples=3, p=5.0, extra=4.0),
        ]
        result = rule.aggregate(updates, state)
        state = result.state
        expected += (product(updates[0].shared) + 3 * product(updates[1].shared)) / 4

        sent = result.personalized["a"].frozen
        torch.testing.assert_close(product(sent), expected)
        assert sent.same_architecture.unpack()["0.A"].shape[0] == min(4 * (round + 1), WIDTH_OUT)
        assert sent.common.vector.tolist() == [4.0 * (round + 1)]
        assert sent.same_architecture.unpack()["0.bias"].tolist() == [3.0 * (round + 1)]
        assert result.personalized["a"].start is None


def test_who_has_missed_a_round_receives_all_of_it():
    rule = Stacking()
    first = rule.aggregate([update("a", 0, 1, num_examples=1, p=1.0), update("b", 0, 1, num_examples=1, p=3.0)], {})

    later = rule.aggregate([update("a", 1, 1, num_examples=1, p=1.0)], first.state)

    assert later.personalized["b"].frozen.common.vector.tolist() == [3.0]
    torch.testing.assert_close(product(later.personalized["b"].frozen), product(later.personalized["a"].frozen))
    assert later.weights[1].tolist() == [1.0, 0.0]
