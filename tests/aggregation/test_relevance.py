"""Clients that come late, leave, or say nothing of their task, and newcomers after training."""

import copy
import math

import pytest
import torch

from lightning_pfl.aggregation import RelevanceAggregator, UniformAggregator
from lightning_pfl.errors import RejectedUpdateError
from lightning_pfl.functional.relevance import FixedMatrix, Softmax, TaskGraph, Uniform
from lightning_pfl.functional.similarity import ColumnCosine
from lightning_pfl.types import ClientUpdate, FlatTensors, SharedTensors

PAPER = Softmax(1.0, standardize=False)


def beside(weights, **more):
    """The paper's structure: mixtures go into the frozen adapter."""
    return RelevanceAggregator(weights, pull=0, global_branch=True, **more)


def update(client, value, sketch=None, *, round=0, architecture="one", **more):
    """One shared number, one architecture-bound number ten times as large."""
    common = FlatTensors.pack({"P": torch.tensor([value])} | {name: torch.tensor([v]) for name, v in more.items()})
    tensors = SharedTensors(common, FlatTensors.pack({"A": torch.tensor([10 * value])}))
    return ClientUpdate(client, round, 1, architecture, tensors, None if sketch is None else torch.tensor(sketch))


def known(aggregator=None):
    """a and b do one task, c another; c is of another architecture."""
    updates = [
        update("a", 1.0, [1.0, 0.0]),
        update("b", 3.0, [1.0, 0.0]),
        update("c", 8.0, [0.0, 1.0], architecture="two"),
    ]
    return (aggregator or beside(PAPER)).aggregate(updates, {})


def numbers(sent):
    return {name: value.item() for name, value in {**sent.common.unpack(), **sent.same_architecture.unpack()}.items()}


def test_a_newcomer_gets_the_mixture_that_its_sketch_asks_for():
    """By hand at temperature 1: cosines 1, 1, 0, so weights e, e, 1; A only from its architecture: half of a and b."""
    welcome = beside(PAPER).welcome(update("new", 0.0, [2.0, 0.0]), known().state)

    e = math.e
    expected = {"P": (1 * e + 3 * e + 8) / (2 * e + 1), "A": 20.0}
    assert numbers(welcome.personalized.frozen) == pytest.approx(expected, rel=1e-6)
    assert welcome.weights == pytest.approx({"a": e / (2 * e + 1), "b": e / (2 * e + 1), "c": 1 / (2 * e + 1)})
    assert welcome.personalized.start is None
    assert not welcome.notes


def test_a_newcomer_is_in_no_mixture_not_even_its_own():
    """`include_self` would mix in an adapter that has learned nothing."""
    aggregator = UniformAggregator(include_self=True, warm_start=Uniform(include_self=True))
    welcome = aggregator.welcome(update("new", 100.0), known(aggregator).state)

    assert numbers(welcome.personalized.frozen) == {"P": 4.0, "A": 20.0}
    assert numbers(welcome.personalized.start) == {"P": 4.0, "A": 20.0}


def test_a_newcomer_without_a_sketch_gets_the_uniform_mixture_and_the_notes_say_so():
    """An unknown task is no error."""
    welcome = beside(PAPER).welcome(update("new", 0.0), known().state)

    assert numbers(welcome.personalized.frozen)["P"] == pytest.approx(4.0)
    assert any("['new']" in note and "uniform" in note for note in welcome.notes)


def test_a_newcomer_alone_in_its_architecture_keeps_its_own_bound_tensors():
    """P comes from everybody, A from nobody."""
    newcomer = update("new", 7.0, [1.0, 0.0], architecture="three", gate=5.0)
    welcome = beside(PAPER).welcome(newcomer, known().state)

    got = numbers(welcome.personalized.frozen)
    assert (got["A"], got["gate"]) == (70.0, 5.0)
    assert got["P"] != 7.0


def test_welcoming_changes_nothing_for_the_others():
    """The state is left alone, so a run may go on or welcome another."""
    state = known().state
    before = copy.deepcopy(state)
    beside(PAPER).welcome(update("new", 7.0, [1.0, 0.0]), state)

    assert str(state) == str(before)


@pytest.mark.parametrize(
    ("newcomer", "state", "message"),
    [
        (update("a", 0.0), None, "`a` is one of them"),
        (update("new", 0.0), {}, "none has sent anything yet"),
        (update("new", 0.0, [1.0, 0.0, 0.0]), None, "sketches of one length"),
    ],
    ids=["id", "nobody", "length"],
)
def test_a_newcomer_that_cannot_be_welcomed_is_told_why(newcomer, state, message):
    with pytest.raises(ValueError, match=message):
        beside(PAPER).welcome(newcomer, known().state if state is None else state)


def test_a_newcomer_with_a_broken_sketch_is_refused():
    """As a client's own would be."""
    with pytest.raises(RejectedUpdateError, match="`new`"):
        beside(PAPER).welcome(update("new", 0.0, [float("nan"), 0.0]), known().state)


def test_when_nobody_can_be_mixed_a_newcomer_is_told_so():
    """Its own start is no mixture of the others."""
    policy = TaskGraph({"a": ["x"], "b": ["x"], "c": ["y"], "new": ["z"]})
    aggregator = beside(policy)

    with pytest.raises(ValueError, match="Nobody's upload can be mixed for the newcomer `new`"):
        aggregator.welcome(update("new", 0.0), known(aggregator).state)


def test_weights_written_down_hold_for_a_newcomer_that_they_name():
    """And one that they do not name is named in the error."""
    aggregator = beside(FixedMatrix({"a": {"b": 1}, "b": {"a": 1}, "c": {"a": 1}, "new": {"c": 1}}))
    state = known(aggregator).state

    assert aggregator.welcome(update("new", 0.0), state).weights == {"c": 1.0}
    with pytest.raises(ValueError, match=r"\['other'\] have none"):
        aggregator.welcome(update("other", 0.0), state)


def test_a_client_that_comes_late_is_mixed_and_mixes_from_its_first_upload_on():
    """Round 1: d appears; its row follows its sketch, and c, whose task it shares, takes most from it."""
    aggregator = beside(PAPER)
    result = aggregator.aggregate([update("d", 5.0, [0.0, 3.0], round=1)], known(aggregator).state)

    rows = dict(zip(result.client_ids, result.weights.tolist(), strict=True))
    e = math.e
    assert rows["d"] == pytest.approx([1 / (e + 2), 1 / (e + 2), e / (e + 2), 0.0])
    assert rows["c"] == pytest.approx([1 / (e + 2), 1 / (e + 2), 0.0, e / (e + 2)])


def test_a_client_that_left_fades_from_the_mixtures_but_its_own_row_lives_on():
    """With `max_staleness=1`, b's upload of round 0 is out of the others' rows in round 2; should it come back, its
    mixture is there."""
    aggregator = beside(PAPER, max_staleness=1)
    state = known(aggregator).state
    for round in (1, 2):
        updates = [update("a", 1.0, [1.0, 0.0], round=round), update("c", 8.0, [0.0, 1.0], round=round)]
        result = aggregator.aggregate([*updates], state)
        state = result.state

    rows = dict(zip(result.client_ids, result.weights.tolist(), strict=True))
    assert rows["a"] == [0.0, 0.0, 1.0]
    assert rows["b"][1] == 0.0
    assert sum(rows["b"]) == pytest.approx(1.0)
    assert any("['b']" in note for note in result.notes)


def test_sketches_are_averaged_by_half_from_round_to_round():
    """The paper's 0.5: (1, 0) and then (0, 1) stand at 45 degrees to both."""
    aggregator = beside(PAPER)
    first = aggregator.aggregate([update("a", 1.0, [1.0, 0.0]), update("b", 1.0, [1.0, 0.0])], {})
    second = aggregator.aggregate([update("a", 1.0, [0.0, 1.0], round=1)], first.state)

    assert second.similarity[0, 1].item() == pytest.approx(math.sqrt(0.5))


def test_the_reference_codes_similarity_is_an_option_object():
    """Sketches (1, 0, 0, 0) and (1, 0, 0, 1) as 2 x 2: columns' cosines 1 and 0 where one column is empty."""
    updates = [update("a", 1.0, [1.0, 0.0, 0.0, 0.0]), update("b", 2.0, [1.0, 0.0, 0.0, 1.0])]
    result = beside(PAPER, similarity=ColumnCosine(2)).aggregate(updates, {})

    assert result.similarity[0, 1].item() == pytest.approx(0.5)


def test_by_default_a_client_is_pulled_half_way_to_its_relatives():
    """By hand at temperature 1, plain cosines: a's row over b and c is e : 1, and half of a stays."""
    result = RelevanceAggregator(PAPER).aggregate(
        [update("a", 1.0, [1.0, 0.0]), update("b", 3.0, [1.0, 0.0]), update("c", 8.0, [0.0, 1.0])], {}
    )

    sent = result.personalized["a"]
    assert sent.frozen is None
    assert numbers(sent.start)["P"] == pytest.approx(0.5 * 1 + 0.5 * (3 * math.e + 8) / (math.e + 1), rel=1e-6)
    assert result.weights[0].tolist() == pytest.approx([0.5, 0.5 * math.e / (math.e + 1), 0.5 / (math.e + 1)])


def test_the_papers_setting_freezes_a_nearly_uniform_mixture_beside_an_adapter_that_nobody_touches():
    """Cosines 1 and 0 at temperature 0.5: e^2 : 1."""
    result = RelevanceAggregator.paper().aggregate(
        [update("a", 1.0, [1.0, 0.0]), update("b", 3.0, [1.0, 0.0]), update("c", 8.0, [0.0, 1.0])], {}
    )

    sent = result.personalized["a"]
    assert sent.start is None
    assert numbers(sent.frozen)["P"] == pytest.approx((3 * math.e**2 + 8) / (math.e**2 + 1), rel=1e-6)


def test_the_pull_is_as_far_as_it_is_told():
    updates = [update("a", 0.0, [1.0, 0.0]), update("b", 10.0, [1.0, 0.0])]
    found = [
        numbers(RelevanceAggregator(pull=pull).aggregate(updates, {}).personalized["a"].start)["P"]
        for pull in (0.1, 0.5, 1.0)
    ]
    assert found == pytest.approx([1.0, 5.0, 10.0])
