"""A and B of conventional layers: averaged as factors, or as what the layers compute."""

import pytest
import torch

from lightning_pfl.aggregation import FactorMean, FedAvg, MixtureAggregator, ProductMean, RelevanceAggregator
from lightning_pfl.functional.relevance import Softmax, Uniform
from lightning_pfl.types import ClientUpdate, FlatTensors, Layout, SharedTensors

ONE = {"0.A": torch.tensor([[1.0, 0.0]]), "0.B": torch.tensor([[2.0], [0.0]]), "0.bias": torch.tensor([1.0])}
TWO = {"0.A": torch.tensor([[3.0, 0.0]]), "0.B": torch.tensor([[4.0], [0.0]]), "0.bias": torch.tensor([5.0])}


def update(client, bound, *, num_examples=1, sketch=None, architecture="one"):
    tensors = SharedTensors(FlatTensors.pack({"P": torch.ones(1)}), FlatTensors.pack(bound))
    return ClientUpdate(client, 0, num_examples, architecture, tensors, sketch)


def product(flat, layer="0"):
    tensors = flat.unpack()
    return tensors[f"{layer}.B"] @ tensors[f"{layer}.A"]


def test_names_and_shapes_say_which_two_tensors_are_factors():
    """A partner that is missing or of another rank makes none, and `.A` alone is no layer's name."""
    names = ("a.A", "a.B", "b.A", "b.B", "c.A", "d.B", "A", "B", "e.A", "e.B")
    shapes = ((2, 8), (4, 2), (2, 8), (4, 3), (2, 8), (4, 2), (2, 8), (4, 2), (2,), (2,))

    assert Layout(names, shapes).factors == {"a": ("a.A", "a.B")}


def test_what_adapters_share_of_conventional_layers_is_found_in_pairs():
    """The names on the wire, made by the adapters themselves, in a model whose layers are all named otherwise."""
    from lightning_pfl.adapters import CoLoraConfig, inject, shared_tensors
    from tests.adapters.tiny import llama

    model = llama()
    report = inject(model, CoLoraConfig(r=4, num_blocks=2))

    shared = shared_tensors(model)
    assert set(shared.same_architecture.layout.factors) == set(report.conventional)
    assert len(shared.same_architecture.layout.names) == 2 * len(report.conventional)
    assert not shared.common.layout.factors


def test_by_hand_factors_average_to_another_product_than_products_do():
    """Products 2 and 12 in one entry: mean 7; factors 2 and 3, whose product is 6. A bias is a plain mean of both."""
    flats = [FlatTensors.pack(ONE), FlatTensors.pack(TWO)]

    by_factors, by_products = (mean.one(flats, [1, 1]).flats[0] for mean in (FactorMean(), ProductMean()))

    torch.testing.assert_close(product(by_factors), torch.tensor([[6.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(product(by_products), torch.tensor([[7.0, 0.0], [0.0, 0.0]]))
    assert by_factors.unpack()["0.bias"] == by_products.unpack()["0.bias"] == 3.0
    assert by_products.layout == flats[0].layout


@pytest.mark.parametrize("mean", [FactorMean(), ProductMean()])
def test_every_client_gets_its_own_row_in_its_own_layout(mean):
    """Row 0 weighs client 1 alone: its very bits. Row 1 weighs nobody: the client keeps its own."""
    flats = [FlatTensors.pack(ONE), FlatTensors.pack(TWO)]

    first, second = mean.rows(flats, torch.tensor([[0.0, 1.0], [0.0, 0.0]])).flats

    assert torch.equal(first.vector, flats[1].vector)
    assert torch.equal(second.vector, flats[1].vector)
    assert second.vector.data_ptr() != flats[1].vector.data_ptr()


def test_ranks_may_be_mixed_and_each_client_receives_its_own():
    """A client of rank 2 and one of rank 1: the first gets the mean whole, the second its best rank-1 part."""
    wide = {"0.A": torch.eye(2), "0.B": torch.diag(torch.tensor([4.0, 2.0]))}
    flats = [FlatTensors.pack(wide), FlatTensors.pack({name: ONE[name] for name in ("0.A", "0.B")})]

    averaged = ProductMean().rows(flats, torch.ones(2, 2))

    torch.testing.assert_close(product(averaged.flats[0]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(product(averaged.flats[1]), torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    assert averaged.layer == "0"
    assert averaged.lost == pytest.approx(1 / 10**0.5)
    assert averaged.notes == ["Mean products B A, cut to their rank, lost up to 31.6% of their norm (at `0`)."]


ORTHOGONAL = {"0.A": torch.tensor([[0.0, 1.0]]), "0.B": torch.tensor([[0.0], [4.0]])}
PAIR = {name: ONE[name] for name in ("0.A", "0.B")}


def test_fedavg_takes_the_mean_of_products_weighed_by_examples_and_notes_what_the_rank_costs():
    """(3 * 2 + 1 * 0) / 4 = 1.5 and (3 * 0 + 1 * 4) / 4 = 1: at rank 1 the larger stays."""
    updates = [update("a", PAIR, num_examples=3), update("b", ORTHOGONAL)]

    result = FedAvg(conventional=ProductMean()).aggregate(updates, {})

    got = result.personalized["b"].start.same_architecture
    torch.testing.assert_close(product(got), torch.tensor([[1.5, 0.0], [0.0, 0.0]]))
    assert len(result.notes) == 1
    assert "55.5%" in result.notes[0]  # 1 / sqrt(1.5**2 + 1**2)
    assert not FedAvg().aggregate(updates, {}).notes


def test_relevance_mixes_products_within_the_architecture_into_both_branches():
    """G of a is b's product alone (it leaves itself out, c is of another width); the warm start is the mean of both."""
    updates = [
        update("a", {"0.A": ONE["0.A"], "0.B": ONE["0.B"]}, sketch=torch.tensor([1.0, 0.0])),
        update("b", {"0.A": TWO["0.A"], "0.B": TWO["0.B"]}, sketch=torch.tensor([1.0, 0.0])),
        update("c", {"0.A": torch.ones(1, 3), "0.B": torch.ones(3, 1)}, sketch=torch.ones(2), architecture="two"),
    ]
    aggregator = RelevanceAggregator(
        Softmax(), warm_start=Uniform(include_self=True), global_branch=True, conventional=ProductMean()
    )

    sent = aggregator.aggregate(updates, {}).personalized["a"]

    assert torch.equal(product(sent.frozen.same_architecture), product(updates[1].shared.same_architecture))
    torch.testing.assert_close(product(sent.start.same_architecture), torch.tensor([[7.0, 0.0], [0.0, 0.0]]))


def test_a_newcomer_and_the_driver_receive_products_too():
    aggregator = MixtureAggregator(Uniform(), conventional=ProductMean())
    updates = [update("a", ONE), update("b", TWO)]

    welcome = aggregator.welcome(update("new", ONE), aggregator.aggregate(updates, {}).state)
    center = aggregator.center(updates)

    expected = torch.tensor([[7.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(product(welcome.personalized.frozen.same_architecture), expected)
    torch.testing.assert_close(product(center.same_architecture), expected)
