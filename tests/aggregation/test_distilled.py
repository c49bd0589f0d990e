"""Predictions on public data: what is made of them, and who receives it."""

import pytest
import torch

from lightning_pfl.aggregation import (
    Distilled,
    FedAvg,
    LocalOnly,
    LowestLoss,
    MeanPredictions,
    Predictions,
    PrototypeMeans,
)
from lightning_pfl.types import ClientUpdate, FlatTensors, SharedTensors


def update(client, architecture, logits, *, p=0.0, num_examples=1):
    classes = len(logits[0])
    common = {"P": torch.tensor([p]), f"public/{classes}/logits": torch.tensor(logits)}
    return ClientUpdate(client, 0, num_examples, architecture, SharedTensors(FlatTensors.pack(common)))


UPDATES = [
    update("a", "small", [[0.0, 1.0]], p=1.0, num_examples=3),
    update("b", "small", [[0.0, 3.0]], p=5.0),
    update("c", "big", [[0.0, 8.0]], p=5.0),
    update("d", "other", [[0.0, 1.0, 2.0]], p=5.0),  # another vocabulary
]


def taught(aggregation, client):
    return {name: value.tolist() for name, value in aggregation.personalized[client].start.common.unpack().items()}


def test_adapters_are_mixed_by_the_other_rule_and_predictions_by_the_ensemble():
    """P goes by examples, (3 * 1 + 3 * 5) / 6 = 3; logits go by heads, (1 + 3 + 8) / 3 = 4."""
    result = Distilled(FedAvg(), MeanPredictions()).aggregate(UPDATES, {})

    assert taught(result, "a") == taught(result, "c") == {"P": [3.0], "public/2/logits": [[0.0, 4.0]]}
    assert taught(result, "d") == {"P": [3.0], "public/3/logits": [[0.0, 1.0, 2.0]]}
    assert result.newcomer.start.common.layout.names == ("P",)


def test_every_architecture_is_a_teacher_of_its_own():
    """The mean of a and b, and c, in the order of architectures: big, small."""
    result = Distilled(FedAvg(), PrototypeMeans()).aggregate(UPDATES, {})

    assert taught(result, "b")["public/2/logits"] == [[[0.0, 8.0]], [[0.0, 2.0]]]
    assert taught(result, "d")["public/3/logits"] == [[[0.0, 1.0, 2.0]]]


def test_who_sits_out_a_round_is_taught_by_those_who_do_not_and_nobody_by_the_past():
    rule = Distilled(FedAvg(), MeanPredictions())
    state = rule.aggregate(UPDATES, {}).state

    later = rule.aggregate([update("c", "big", [[0.0, 6.0]], p=7.0)], state)

    assert taught(later, "a") == {"P": [7.0], "public/2/logits": [[0.0, 6.0]]}
    assert taught(later, "d") == {"P": [7.0]}


def test_beside_a_rule_that_sends_nothing_predictions_are_sent_alone():
    result = Distilled(LocalOnly(), MeanPredictions()).aggregate(UPDATES[:2], {})

    assert taught(result, "a") == {"public/2/logits": [[0.0, 2.0]]}
    assert result.personalized["a"].frozen is None


def test_the_drivers_module_shows_adapters_only():
    center = Distilled(FedAvg(), MeanPredictions()).center(UPDATES[:2])

    assert center.common.unpack() == {"P": torch.tensor([2.0])}


def test_each_row_has_the_teacher_with_the_lowest_loss_and_of_equal_ones_the_first():
    told = [
        Predictions(
            "a", "x", {"1/logits": torch.tensor([[1.0], [1.0], [1.0]]), "1/losses": torch.tensor([0.1, 0.9, 0.5])}
        ),
        Predictions(
            "b", "y", {"1/logits": torch.tensor([[2.0], [2.0], [2.0]]), "1/losses": torch.tensor([0.2, 0.3, 0.5])}
        ),
    ]

    best = LowestLoss().teach(told)

    assert best["1/logits"].flatten().tolist() == [1.0, 2.0, 1.0]
    assert best["1/losses"].tolist() == pytest.approx([0.1, 0.3, 0.5])


def test_losses_must_come_beside_logits():
    with pytest.raises(ValueError, match="must send `2/losses` beside `2/logits`"):
        Distilled(LocalOnly(), LowestLoss()).aggregate(UPDATES[:2], {})


@pytest.mark.parametrize("ensemble", [MeanPredictions(), PrototypeMeans()])
def test_clients_with_other_public_sets_are_named(ensemble):
    updates = [UPDATES[0], update("b", "small", [[0.0, 3.0], [0.0, 1.0]])]

    with pytest.raises(ValueError, match=r"2/logits` has the shape \(1, 2\) on `a` and \(2, 2\) on `b`"):
        ensemble.teach(
            [
                Predictions(one.client_id, "small", {"2/logits": one.shared.common.unpack()["public/2/logits"]})
                for one in updates
            ]
        )
