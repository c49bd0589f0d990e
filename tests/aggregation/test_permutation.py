"""Clients have no order: what each receives follows it, whoever is heard first and whatever clients are called."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pfl.aggregation import FedAvg, RelevanceAggregator, UniformAggregator
from lightning_pfl.types import ClientUpdate, FlatTensors, SharedTensors

AGGREGATORS = {
    "relevance": RelevanceAggregator,
    "the paper's": RelevanceAggregator.paper,
    "uniform": UniformAggregator,
    "fedavg": FedAvg,
}
every_aggregator = pytest.mark.parametrize("make", AGGREGATORS.values(), ids=AGGREGATORS.keys())


@st.composite
def rounds(draw):
    """One to six clients, then some of them: of two architectures, some without a sketch, some with one name more."""
    count = draw(st.integers(1, 6))
    ids = [f"client-{index}" for index in range(count)]
    kinds = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def update(index, round):
        names = ["language/0/q/P", *(["language/0/gate/P"] if draw(st.booleans()) else [])]
        common = {name: torch.randn(2, 2, generator=generator) for name in names}
        bound = {"A": torch.randn(2, 3 if kinds[index] else 4, generator=generator)}
        sketch = draw(st.none() | st.lists(st.integers(-3, 3), min_size=4, max_size=4))
        return ClientUpdate(
            client_id=ids[index],
            round=round,
            num_examples=draw(st.integers(1, 1000)),
            architecture="narrow" if kinds[index] else "wide",
            shared=SharedTensors(FlatTensors.pack(common), FlatTensors.pack(bound)),
            sketch=None if sketch is None else torch.tensor(sketch, dtype=torch.float32),
        )

    again = draw(st.sets(st.integers(0, count - 1), min_size=1))
    return [update(index, 0) for index in range(count)], [update(index, 1) for index in sorted(again)]


def received(aggregator, played):
    """Per client, what it is sent after each round."""
    state, sent = {}, []
    for updates in played:
        result = aggregator.aggregate(updates, state)
        state = result.state
        sent.append({client: numbers(one) for client, one in result.personalized.items()})
    return sent


def numbers(personalized):
    """The tensors of G and L, by name; empty where nothing is sent."""
    return [
        {} if part is None else {**part.common.unpack(), **part.same_architecture.unpack()}
        for part in (personalized.frozen, personalized.start)
    ]


@every_aggregator
@settings(max_examples=40, deadline=None)
@given(played=rounds(), random=st.randoms(use_true_random=False))
def test_permuting_updates_changes_no_bit_of_what_a_client_receives(make, played, random):
    """Aggregators put clients in an order of their own before they sum."""
    permuted = [random.sample(updates, len(updates)) for updates in played]

    torch.testing.assert_close(received(make(), permuted), received(make(), played), rtol=0, atol=0)


@every_aggregator
@settings(max_examples=40, deadline=None)
@given(played=rounds(), random=st.randoms(use_true_random=False))
def test_permuting_the_names_of_clients_permutes_what_they_receive(make, played, random):
    """Sums then have another order; where cosines are nearly equal, standardising them makes more of its rounding."""
    ids = [update.client_id for update in played[0]]
    called = dict(zip(ids, random.sample(ids, len(ids)), strict=True))
    renamed = [[replace(update, client_id=called[update.client_id]) for update in updates] for updates in played]

    expected = [{called[client]: sent for client, sent in after.items()} for after in received(make(), played)]

    torch.testing.assert_close(received(make(), renamed), expected, rtol=0, atol=1e-3)
