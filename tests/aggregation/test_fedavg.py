"""Promises of `lightning_pfl.aggregation.fedavg`."""

from dataclasses import replace

import pytest
import torch

from lightning_pfl.aggregation import FedAvg
from lightning_pfl.types import ClientUpdate, FlatTensors, SharedTensors


def update(client, value, number, round=0, architecture="one", name="P"):
    tensors = SharedTensors(
        FlatTensors.pack({name: torch.tensor([value])}), FlatTensors.pack({"A": torch.tensor([10 * value])})
    )
    return ClientUpdate(client, round, number, architecture, tensors)


def start(result, client):
    part = result.personalized[client].start
    return part.common.vector.item(), part.same_architecture.vector.item()


def test_means_are_weighted_by_examples_within_the_architecture_for_bound_tensors():
    """P over all: (0*1 + 4*3 + 8*4) / 8 = 5.5; A over a and b: (0 + 40*3) / 4 = 30, c alone: 80."""
    result = FedAvg().aggregate([update("a", 0.0, 1), update("b", 4.0, 3), update("c", 8.0, 4, architecture="two")], {})

    assert start(result, "a") == start(result, "b") == (5.5, 30.0)
    assert start(result, "c") == (5.5, 80.0)
    assert result.weights.tolist() == [[0.125, 0.375, 0.5]] * 3


def test_only_the_rounds_participants_are_averaged_and_everybody_receives_it():
    """McMahan's rule: a client that sat out does not vote, but starts from the new mean next time."""
    first = FedAvg().aggregate([update("a", 0.0, 1), update("b", 4.0, 1)], {})
    second = FedAvg().aggregate([update("a", 7.0, 1, round=1)], first.state)

    assert start(second, "b") == (7.0, 70.0)
    assert second.weights.tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_an_update_that_comes_late_weighs_less():
    """Three rounds late under exponent 1/2 its two examples weigh like one: P is (0 + 4) / 2, A ten times it."""
    late = replace(update("b", 4.0, 2), staleness=3)

    result = FedAvg(staleness_exponent=0.5).aggregate([update("a", 0.0, 1, round=3), late], {})

    assert start(result, "a") == (2.0, 20.0)
    assert result.weights.tolist() == [[0.5, 0.5]] * 2
    assert start(FedAvg().aggregate([update("a", 0.0, 1, round=3), late], {}), "a")[0] == pytest.approx(8 / 3)


def test_a_negative_exponent_is_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        FedAvg(staleness_exponent=-1.0)


def test_what_no_participant_holds_keeps_its_last_mean():
    """Round 1 has only a, of another architecture and without b's `Q`: b's tensors stay."""
    first = FedAvg().aggregate([update("a", 1.0, 1), update("b", 4.0, 1, architecture="two", name="Q")], {})
    second = FedAvg().aggregate([update("a", 7.0, 1, round=1)], first.state)

    assert start(second, "b") == (4.0, 40.0)


def test_clients_of_one_kind_are_sent_one_object():
    """A thousand clients of one architecture cost the driver's memory no more than one."""
    updates = [update("a", 0.0, 1), update("b", 4.0, 3), update("c", 8.0, 4, architecture="two")]
    result = FedAvg().aggregate(updates, {})

    assert result.personalized["a"] is result.personalized["b"]
    assert result.personalized["a"] is not result.personalized["c"]
    assert result.weights.untyped_storage().nbytes() == 3 * 4, "a row of float32, not a matrix"


def test_a_newcomer_must_still_fit_what_absent_clients_hold():
    """b and c are not in round 1, and of their kind one is looked at: that is enough to see that `P` differs."""
    first = FedAvg().aggregate([update("b", 0.0, 1), update("c", 4.0, 1)], {})
    wide = SharedTensors(FlatTensors.pack({"P": torch.zeros(2)}), FlatTensors.pack({"A": torch.zeros(1)}))

    with pytest.raises(ValueError, match="`P` must have one shape on all clients"):
        FedAvg().aggregate([ClientUpdate("a", 1, 1, "two", wide)], first.state)
