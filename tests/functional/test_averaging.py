"""Promises of `lightning_pfl.functional.averaging`."""

import pytest
import torch

from lightning_pfl.functional import averaging
from lightning_pfl.functional.averaging import mix, select, weighted_mean
from lightning_pfl.types import FlatTensors, Layout


def flat(**tensors):
    return FlatTensors.pack({name: torch.tensor(values) for name, values in tensors.items()})


def test_every_client_gets_the_mean_that_its_row_says():
    """By hand: row 0 is client 1's values, row 1 a quarter and three quarters."""
    flats = [flat(P=[0.0, 4.0], Q=[8.0]), flat(P=[4.0, 0.0], Q=[0.0])]

    mixed = mix(flats, torch.tensor([[0.0, 1.0], [0.25, 0.75]]))

    assert mixed[0].vector.tolist() == [4.0, 0.0, 0.0]
    assert mixed[1].vector.tolist() == [3.0, 1.0, 2.0]


def test_mix_ignores_the_scale_of_a_row():
    """Only ratios matter."""
    flats = [flat(P=[0.0]), flat(P=[4.0])]

    assert mix(flats, torch.tensor([[1.0, 3.0], [2.0, 6.0]]))[0].vector.tolist() == [3.0]
    assert mix(flats, torch.tensor([[1.0, 3.0], [2.0, 6.0]]))[1].vector.tolist() == [3.0]


def many(count, numel=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [flat(P=torch.randn(numel, generator=generator).tolist()) for _ in range(count)]


def expected(flats, rows):
    """In float64, all at once."""
    rows = rows.double()
    values = torch.stack([one.vector for one in flats]).double()
    totals = rows.sum(1, keepdim=True)
    return torch.where(totals > 0, rows @ values / totals.where(totals > 0, 1.0), values).float()


@pytest.mark.parametrize("at_once", [1, 7 * 3, 7 * 4, 10**6], ids=lambda numbers: f"{numbers} numbers")
def test_columns_are_taken_in_chunks_of_any_width(monkeypatch, at_once):
    """Seven clients of ten numbers, 1, 3, 4 and 10 columns at a time; client 2 takes nobody and keeps its own."""
    monkeypatch.setattr(averaging, "_AT_ONCE", at_once)
    rows = torch.rand(7, 7, generator=torch.Generator().manual_seed(1))
    rows[2] = 0
    flats = many(7)

    mixed = mix(flats, rows)

    torch.testing.assert_close(torch.stack([one.vector for one in mixed]), expected(flats, rows))
    assert torch.equal(mixed[2].vector, flats[2].vector)


def test_clients_that_share_nothing_of_a_kind_get_nothing():
    """No layer is private to an architecture, say."""
    mixed = mix([FlatTensors.pack({}), FlatTensors.pack({})], torch.ones(2, 2))

    assert [flat.vector.numel() for flat in mixed] == [0, 0]


@pytest.mark.parametrize("kept", [3, 60], ids=["few", "many"])
def test_rows_of_mostly_zeros_give_the_same(kept):
    flats, rows = many(300), torch.zeros(300, 300)
    rows.scatter_(1, torch.rand(300, 300, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :kept], 0.5)
    rows[0] = 0

    mixed = mix(flats, rows)

    torch.testing.assert_close(torch.stack([one.vector for one in mixed]), expected(flats, rows))
    assert averaging._scaled(rows, rows.sum(1).double()).is_sparse == (kept == 3)


def test_a_name_is_mixed_over_those_that_hold_it():
    """`G` is private to clients 0 and 2. For client 0 they weigh .2 and .3, so 2/5 and 3/5; client 1 never sees it."""
    flats = [flat(G=[10.0], P=[1.0]), flat(P=[2.0]), flat(G=[20.0], P=[4.0])]
    rows = torch.tensor([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])

    mixed = mix(flats, rows)

    torch.testing.assert_close(mixed[0].unpack(), {"G": torch.tensor([16.0]), "P": torch.tensor([2.4])})
    assert mixed[1].layout.names == ("P",)
    # client 2 weighs no holder of G, so it keeps its own
    torch.testing.assert_close(mixed[2].unpack(), {"G": torch.tensor([20.0]), "P": torch.tensor([2.0])})


def test_layouts_in_another_order_are_mixed_by_name_and_each_client_keeps_its_order():
    """The order in a vector is the client's own affair."""
    backwards = FlatTensors(Layout(("Q", "P"), ((1,), (2,))), torch.tensor([7.0, 1.0, 2.0]))
    forwards = flat(P=[3.0, 4.0], Q=[9.0])

    mixed = mix([backwards, forwards], torch.tensor([[0.0, 1.0], [1.0, 0.0]]))

    assert mixed[0].vector.tolist() == [9.0, 3.0, 4.0]
    assert mixed[1].vector.tolist() == [1.0, 2.0, 7.0]


def test_mixed_vectors_are_fresh_and_inputs_untouched():
    """Even a client that keeps its own gets a copy."""
    flats = [flat(P=[1.0]), flat(P=[2.0])]

    mixed = mix(flats, torch.eye(2))
    mixed[0].vector.fill_(99.0)

    assert flats[0].vector.tolist() == [1.0]
    assert mixed[1].vector.data_ptr() != flats[1].vector.data_ptr()


def test_two_shapes_of_one_name_are_refused_by_name():
    """Broadcasting them into a mean is what another framework does in silence."""
    with pytest.raises(ValueError, match=r"`P` must have one shape .* \(2,\) on client 0 and \(1,\) on client 1"):
        mix([flat(P=[1.0, 2.0]), flat(P=[1.0])], torch.full((2, 2), 0.5))


@pytest.mark.parametrize(
    "rows", [torch.ones(2, 3), torch.tensor([[1.0, -1.0], [1.0, 1.0]]), torch.full((2, 2), torch.nan)]
)
def test_rows_that_are_no_weights_are_refused(rows):
    """Another shape, a negative entry, NaN."""
    with pytest.raises(ValueError, match="eight"):
        mix([flat(P=[1.0]), flat(P=[2.0])], rows)


def test_weighted_mean_ignores_the_scale_of_the_weights():
    """Doubling every example count changes nothing: FedAvg uses n_k / n."""
    flats = [flat(P=[0.0, 4.0]), flat(P=[2.0, 0.0])]

    # by hand: 1/4 * (0, 4) + 3/4 * (2, 0)
    for weights in ([1, 3], [2, 6]):
        assert weighted_mean(flats, weights).vector.tolist() == [1.5, 1.0]


def test_weighted_mean_is_per_name_over_its_holders():
    """Q lies on client 1 alone, whatever its weight; R's only holder weighs nothing, so there is no mean of R."""
    mean = weighted_mean([flat(P=[0.0], R=[5.0]), flat(P=[4.0], Q=[8.0])], [0, 2])

    assert mean.layout.names == ("P", "Q")
    assert mean.vector.tolist() == [4.0, 8.0]


@pytest.mark.parametrize("weights", [[0, 0], [1], [], [1, float("inf")], [-1, 2]])
def test_weighted_mean_refuses_weights_that_are_none(weights):
    """All zero, too few, none, infinite, negative."""
    flats = [flat(P=[0.0]), flat(P=[1.0])]
    with pytest.raises(ValueError, match="eight"):
        weighted_mean(flats[: max(len(weights), 0)] if not weights else flats, weights)


def test_select_copies_what_is_asked_for_in_the_layouts_order():
    """And passes over names that are not there."""
    whole = flat(P=[1.0, 2.0], Q=[3.0], R=[4.0])

    part = select(whole, ["R", "P", "nowhere"])
    part.vector.zero_()

    assert part.layout == Layout(("P", "R"), ((2,), (1,)))
    assert whole.vector.tolist() == [1.0, 2.0, 3.0, 4.0]
