"""Promises of `RobustAggregator` and its rules."""

import pytest
import torch

from lightning_pfl.aggregation import ClippedRelevance, CoordinateMedian, Krum, RobustAggregator, TrimmedMean
from lightning_pfl.functional.relevance import Peers, Softmax, TopK, Uniform
from lightning_pfl.types import ClientUpdate, FlatTensors, SharedTensors


def update(client, value, *, architecture="one", bound=None, extra=None, sketch=None, round=0):
    common = {"tower/0/q/P": torch.tensor(value, dtype=torch.float32)}
    if extra is not None:
        common["tower/0/gate/P"] = torch.tensor([extra])
    own = FlatTensors.empty() if bound is None else FlatTensors.pack({"layers.0.q/A": torch.tensor([bound])})
    return ClientUpdate(client, round, 10, architecture, SharedTensors(FlatTensors.pack(common), own), sketch)


def received(result, client, part="common"):
    return getattr(result.personalized[client].frozen, part).unpack()


@pytest.mark.parametrize("rule", [CoordinateMedian(), TrimmedMean(), Krum(), ClippedRelevance(Uniform())])
@pytest.mark.parametrize("lie", [[-1e6, -1e6], [1e6, -1e6], [0.0, -30.0]])
def test_liars_move_what_the_others_receive_no_further_than_the_honest_lie_apart(rule, lie):
    honest = [update(f"h{index}", [1.0 + 0.1 * index, 1.0 - 0.1 * index]) for index in range(6)]
    liars = [update(f"x{index}", lie) for index in range(2)]

    result = RobustAggregator(rule, num_attackers=2).aggregate([*honest, *liars], {})

    for index in range(6):
        mixture = received(result, f"h{index}")["tower/0/q/P"]
        # coordinates of the honest go from 1 to 1.5 and from 0.5 to 1; shortening may take a little off
        assert 0.8 <= float(mixture[0]) <= 1.5
        assert 0.4 <= float(mixture[1]) <= 1.1


def test_p_is_mixed_over_all_and_a_within_the_architecture():
    """By hand: median of 1 2 3 4 5 6 is 3.5; A of `one` 10 20 30 40 is 25. `two` has two clients, four are needed."""
    items = [update(f"a{value}", [float(value)], bound=10.0 * value) for value in (1, 2, 3, 4)]
    items += [update(f"b{value}", [float(value)], bound=float(value), architecture="two") for value in (5, 6)]

    result = RobustAggregator(num_attackers=1).aggregate(items, {})

    for client in ("a1", "b6"):
        assert received(result, client)["tower/0/q/P"].tolist() == [3.5]
    assert received(result, "a1", "same_architecture")["layers.0.q/A"].tolist() == [25.0]
    assert received(result, "b5", "same_architecture")["layers.0.q/A"].tolist() == [5.0]
    (note,) = result.notes
    assert "2 clients (`b5`, `b6`) hold `layers.0.q/A`, but 4 are needed where 1 may lie: each keeps its own." in note


def test_a_client_that_keeps_its_own_keeps_it_shortened():
    """Sizes 1, 1, 1, 1, 2 and 50: of the group of two, the client of 50 keeps twice the median size."""
    items = [update(f"a{value}", [0.0], bound=1.0) for value in (1, 2, 3, 4)]
    items += [update("b1", [0.0], bound=2.0, architecture="two"), update("b2", [0.0], bound=50.0, architecture="two")]

    result = RobustAggregator(num_attackers=1).aggregate(items, {})

    assert received(result, "b1", "same_architecture")["layers.0.q/A"].tolist() == [2.0]
    assert received(result, "b2", "same_architecture")["layers.0.q/A"].tolist() == [2.0]


def test_a_role_that_few_models_have_is_a_group_of_its_own():
    """`gate` is held by two of six: nobody takes the other's, while `q` is mixed."""
    items = [update(f"a{value}", [float(value)]) for value in (1, 2, 3, 4)]
    items += [update(f"b{value}", [float(value)], extra=float(value), architecture="two") for value in (5, 6)]

    result = RobustAggregator(num_attackers=1).aggregate(items, {})

    assert {name: value.tolist() for name, value in received(result, "b6").items()} == {
        "tower/0/q/P": [3.5],
        "tower/0/gate/P": [6.0],
    }
    assert "tower/0/gate/P" in result.notes[0]


@pytest.mark.parametrize(("rule", "enough"), [(CoordinateMedian(), 6), (TrimmedMean(), 6), (Krum(), 7)])
def test_a_federation_that_is_too_small_is_not_mixed(rule, enough):
    """Two of five may lie: the honest would be three against two, and one is oneself."""
    for count in (enough - 1, enough):
        items = [update(f"a{value}", [1.0 + value]) for value in range(count)]
        result = RobustAggregator(rule, num_attackers=2).aggregate(items, {})
        kept = all(received(result, f"a{value}")["tower/0/q/P"].tolist() == [1.0 + value] for value in range(count))
        assert kept == (count < enough)
        assert bool(result.notes) == (count < enough)


def test_those_who_contradict_a_client_are_not_in_its_row_however_relevant_they_look():
    """Relevance 1 with everybody; -L has cosine -1 with L."""
    values = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0], [0.0, 1.0]])
    peers = Peers.fresh(list("abxc"), similarity=torch.ones(4, 4))

    rows = ClippedRelevance(Softmax(1.0)).mix(values, peers, 1).rows

    # by hand, row a: cosines with b, x, c are .707, -1, 0
    torch.testing.assert_close(rows[0], torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    # row b: .707 with a, -.707 with x, .707 with c
    torch.testing.assert_close(rows[1], torch.tensor([0.5, 0.0, 0.0, 0.5], dtype=torch.float64))
    # x agrees with nobody and receives its own, shortened to the median length 1
    torch.testing.assert_close(rows[2], torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64))


def test_a_long_update_counts_like_one_of_median_length():
    values = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1e6, 0.0]])
    mixed = ClippedRelevance(Uniform()).mix(values, Peers.fresh(list("abx")), 0)
    torch.testing.assert_close(mixed.values, torch.tensor([[1.0, 0.0]] * 3))


def test_nobody_has_more_of_a_row_than_allowed():
    """Uncapped, b's row is a's alone; with at most half, what is over goes to the others in proportion."""
    values = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [1.0, 0.3]])
    similarity = torch.tensor([[1.0, 9.0, 1.0, 2.0]] * 4)
    peers = Peers.fresh(list("abcd"), similarity=similarity)

    free = ClippedRelevance(Softmax(0.5, standardize=False)).mix(values, peers, 1).rows[0]
    capped = ClippedRelevance(Softmax(0.5, standardize=False), max_weight=0.5).mix(values, peers, 1).rows[0]

    assert free[1] > 0.99
    assert float(capped[1]) == pytest.approx(0.5)
    assert float(capped[2:].sum()) == pytest.approx(0.5)
    # where only one counts there is nobody to give the rest to
    alone = ClippedRelevance(TopK(1, Softmax(0.5)), max_weight=0.5).mix(values, peers, 1).rows[0]
    assert float(alone[1]) == pytest.approx(1.0)


def test_old_uploads_are_not_mixed_but_their_clients_receive():
    aggregator = RobustAggregator(num_attackers=1, max_staleness=0)
    state = aggregator.aggregate([update("old", [99.0])], {}).state

    result = aggregator.aggregate([update(f"a{value}", [float(value)], round=1) for value in (1, 2, 3, 4)], state)

    assert received(result, "old")["tower/0/q/P"].tolist() == [2.5]
    assert received(result, "a1")["tower/0/q/P"].tolist() == [2.5]


def test_a_newcomer_receives_the_median_of_what_all_hold():
    items = [update(f"a{value}", [float(value)], extra=1.0 if value < 3 else None) for value in (1, 2, 3, 4)]
    newcomer = RobustAggregator(num_attackers=1).aggregate(items, {}).newcomer
    assert {name: value.tolist() for name, value in newcomer.frozen.common.unpack().items()} == {"tower/0/q/P": [2.5]}
    few = RobustAggregator(num_attackers=2).aggregate(items, {}).newcomer
    assert not few.frozen.common.layout.names


def test_what_stands_on_the_driver_is_no_liars_either():
    items = [update(f"a{value}", [float(value)], bound=float(value)) for value in (1, 2, 3)]
    liar = update("x", [-1e9], bound=-1e9)
    center = RobustAggregator().center([*items, liar])
    assert center.common.vector.tolist() == [1.5]
    assert center.same_architecture.vector.tolist() == [1.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_branch": False}, "A mixture must go somewhere"),
        ({"num_attackers": -1}, "`num_attackers` counts clients"),
        ({"ema": 1.0}, "`ema`"),
        ({"max_staleness": -1}, "`max_staleness`"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RobustAggregator(**arguments)


def test_rules_refuse_settings_that_make_no_sense():
    with pytest.raises(ValueError, match="keeps at least one"):
        Krum(keep=0)
    with pytest.raises(ValueError, match="share of a row"):
        ClippedRelevance(max_weight=0.0)
