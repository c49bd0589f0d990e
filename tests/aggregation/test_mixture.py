"""Promises of `lightning_pfl.aggregation.mixture` and of the two rules made of it."""

import math
from dataclasses import replace

import pytest
import torch

from lightning_pfl.aggregation import MixtureAggregator, RelevanceAggregator, UniformAggregator
from lightning_pfl.functional.relevance import Softmax, Uniform
from lightning_pfl.functional.staleness import Fading
from lightning_pfl.types import ClientUpdate, FlatTensors, SharedTensors


def update(client, value, round=0, sketch=None, architecture="one", role=None):
    """One shared number, one architecture-bound number ten times as large."""
    common = {"P": torch.tensor([value])} | ({} if role is None else {role: torch.tensor([value])})
    tensors = SharedTensors(FlatTensors.pack(common), FlatTensors.pack({"A": torch.tensor([10 * value])}))
    return ClientUpdate(client, round, 1, architecture, tensors, None if sketch is None else torch.tensor(sketch))


def frozen(result, client):
    part = result.personalized[client].frozen
    return part.common.unpack()["P"].item(), part.same_architecture.unpack()["A"].item()


def test_uniform_mixes_common_tensors_over_all_and_bound_ones_over_the_architecture():
    """a and b are one architecture, c another: a's P is the mean of 2 and 6, its A only b's; c keeps its own A."""
    result = UniformAggregator().aggregate(
        [update("a", 1.0), update("b", 2.0), update("c", 6.0, architecture="two")], {}
    )

    assert frozen(result, "a") == (4.0, 20.0)
    assert frozen(result, "b") == (3.5, 10.0)
    assert frozen(result, "c") == (1.5, 60.0)
    assert result.personalized["a"].start is None


def test_relevance_rows_are_renormalised_within_an_architecture():
    """The paper's: softmax masked to the architecture. Cosines of a with b, c, d: 1, 0, 0; temperature 1."""
    updates = [
        update("a", 0.0, sketch=[1.0, 0.0]),
        update("b", 1.0, sketch=[1.0, 0.0]),
        update("c", 2.0, sketch=[0.0, 1.0]),
        update("d", 3.0, sketch=[0.0, 1.0], architecture="two"),
    ]
    result = RelevanceAggregator(Softmax(1.0, standardize=False), pull=0, global_branch=True).aggregate(updates, {})

    e = math.e
    expected = (1 * e + 2 + 3) / (e + 2), 10 * (1 * e + 2) / (e + 1)
    assert frozen(result, "a") == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(result.weights[0], torch.tensor([0.0, e, 1.0, 1.0]) / (e + 2))
    torch.testing.assert_close(result.similarity[0], torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_a_warm_start_overwrites_the_clients_own_adapter_beside_the_global_branch():
    """G from the others (2 and 6), L from all three (1, 2, 6): both mixtures of the same uploads."""
    aggregator = UniformAggregator(warm_start=Uniform(include_self=True))
    result = aggregator.aggregate([update("a", 1.0), update("b", 2.0), update("c", 6.0)], {})

    assert frozen(result, "a") == (4.0, 40.0)
    start = result.personalized["a"].start
    assert (start.common.vector.item(), start.same_architecture.vector.item()) == pytest.approx((3.0, 30.0))


def test_without_a_global_branch_the_shown_weights_are_those_of_the_warm_start():
    """What is logged is what was mixed."""
    aggregator = MixtureAggregator(Softmax(), warm_start=Uniform(include_self=True), global_branch=False)
    result = aggregator.aggregate([update("a", 1.0), update("b", 3.0)], {})

    assert not aggregator.uses_global_branch
    assert not aggregator.needs_sketches
    assert result.weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert result.personalized["a"].frozen is None
    assert result.personalized["a"].start.common.vector.item() == 2.0


def test_the_last_known_upload_of_a_client_that_sits_out_is_mixed():
    """Round 1 without b: a still mixes b's value of round 0, and b receives a's new one."""
    first = UniformAggregator().aggregate([update("a", 1.0), update("b", 2.0)], {})
    second = UniformAggregator().aggregate([update("a", 5.0, round=1)], first.state)

    assert frozen(second, "a")[0] == 2.0
    assert frozen(second, "b")[0] == 5.0


def test_an_upload_older_than_max_staleness_is_not_mixed_and_the_notes_say_so():
    """With a limit of one round, b's upload of round 0 counts in round 1 and no longer in round 2."""
    aggregator = UniformAggregator(max_staleness=1)
    state = aggregator.aggregate([update("a", 1.0), update("b", 2.0), update("c", 3.0)], {}).state
    second = aggregator.aggregate([update("a", 1.0, round=1), update("c", 3.0, round=1)], state)
    third = aggregator.aggregate([update("a", 1.0, round=2), update("c", 3.0, round=2)], second.state)

    assert frozen(second, "a")[0] == 2.5
    assert not second.notes
    assert frozen(third, "a")[0] == 3.0
    assert frozen(third, "b")[0] == 2.0
    assert any("['b']" in note for note in third.notes)


def test_ages_count_from_the_round_in_which_uploads_are_mixed_even_if_all_come_late():
    """Round 5 has but an update of round 3: b's of round 0 is five rounds old, a's own two."""
    state = UniformAggregator().aggregate([update("a", 1.0), update("b", 2.0), update("c", 3.0)], {}).state
    late = replace(update("a", 1.0, round=3), staleness=2)

    limited = UniformAggregator(max_staleness=4).aggregate([late], state)
    faded = MixtureAggregator(Fading(Uniform(), exponent=1.0)).aggregate([late], state)

    assert frozen(limited, "a")[0] == 1.0  # nobody is fresh enough
    torch.testing.assert_close(faded.weights[1], torch.tensor([2 / 3, 0.0, 1 / 3]))  # 1/3 of age 2, 1/6 of age 5


def test_a_newcomer_receives_the_mean_of_what_all_clients_hold():
    """P is everywhere; `up` is private to a family, so a client whose model is unknown does not get it."""
    result = UniformAggregator().aggregate([update("a", 1.0), update("b", 3.0, role="up")], {})

    assert result.newcomer.frozen.common.unpack() == {"P": torch.tensor([2.0])}
    assert result.newcomer.start is None


def test_missing_sketches_are_noted_once_per_round_with_the_clients():
    """A uniform row for lack of a sketch must not look like a finding."""
    result = RelevanceAggregator(pull=0, global_branch=True).aggregate(
        [update("a", 1.0, sketch=[1.0, 0.0]), update("b", 2.0), update("c", 3.0, sketch=[0.0, 0.0])], {}
    )

    assert [note for note in result.notes if "['b', 'c']" in note and "uniform" in note]
    assert result.weights[1].tolist() == [0.5, 0.0, 0.5]


def test_without_any_sketch_relevance_is_uniform_and_there_is_no_similarity():
    """The first round with a probe that has not run."""
    result = RelevanceAggregator(pull=0, global_branch=True).aggregate(
        [update("a", 1.0), update("b", 2.0), update("c", 6.0)], {}
    )

    assert result.similarity is None
    assert frozen(result, "a") == (4.0, 40.0)


def test_a_mixture_that_goes_nowhere_is_refused():
    """No global branch, no warm start: the message names both ways out."""
    with pytest.raises(ValueError, match=r"warm_start=.*LocalOnly"):
        MixtureAggregator(Uniform(), global_branch=False)
    with pytest.raises(ValueError, match=r"global_branch=True.*LocalOnly"):
        RelevanceAggregator(pull=0)


@pytest.mark.parametrize(
    "settings", [{"ema": 1.0}, {"ema": -0.1}, {"max_staleness": -1}, {"pull": 1.5}, {"pull": -0.1}]
)
def test_settings_out_of_range_are_refused_by_name(settings):
    """At construction, not in round 3."""
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}`"):
        RelevanceAggregator(**settings)


def test_nothing_to_aggregate_is_an_error():
    """All clients failed in the first round."""
    with pytest.raises(ValueError, match="no client"):
        UniformAggregator().aggregate([], {})
