"""What every aggregator promises, run over all of them."""

import copy
import io

import pytest
import torch

from lightning_pfl.aggregation import (
    ClippedRelevance,
    Distilled,
    FedAvg,
    Krum,
    LocalOnly,
    MeanPredictions,
    MixtureAggregator,
    ProductMean,
    RelevanceAggregator,
    RobustAggregator,
    Stacking,
    TrimmedMean,
    UniformAggregator,
    UpdateGuard,
)
from lightning_pfl.errors import CheckpointMismatchError, RejectedUpdateError
from lightning_pfl.functional.controls import Alone, Shuffled
from lightning_pfl.functional.relevance import FixedMatrix, SampleCount, Softmax, TaskGraph, TopK, Uniform
from lightning_pfl.types import ClientUpdate, FlatTensors, SharedTensors

IDS = ("alpha", "beta", "delta", "gamma", "omega")
TASKS = {"alpha": ["x"], "beta": ["x"], "delta": ["y"], "gamma": ["y"], "omega": ["z"]}
AGGREGATORS = {
    "fedavg": lambda **kwargs: FedAvg(**kwargs),
    "fedavg by norm": lambda **kwargs: FedAvg(by_norm=True, **kwargs),
    "fedavg beside one's own": lambda **kwargs: FedAvg(global_branch=True, **kwargs),
    "no exchange": lambda **kwargs: MixtureAggregator(Alone(), **kwargs),
    "random relevance": lambda **kwargs: RelevanceAggregator(Shuffled(Softmax()), pull=0, global_branch=True, **kwargs),
    "local only": lambda **kwargs: LocalOnly(**kwargs),
    "uniform": lambda **kwargs: UniformAggregator(**kwargs),
    "relevance": lambda **kwargs: RelevanceAggregator(**kwargs),
    "the paper's": lambda **kwargs: RelevanceAggregator(
        Softmax(0.5, standardize=False), pull=0, global_branch=True, **kwargs
    ),
    "pull beside a frozen mixture": lambda **kwargs: RelevanceAggregator(global_branch=True, **kwargs),
    "warm start": lambda **kwargs: RelevanceAggregator(
        warm_start=Uniform(include_self=True), global_branch=True, **kwargs
    ),
    "warm start alone": lambda **kwargs: RelevanceAggregator(
        warm_start=Softmax(include_self=True), global_branch=False, **kwargs
    ),
    "top 2": lambda **kwargs: MixtureAggregator(TopK(2), **kwargs),
    "sample count": lambda **kwargs: MixtureAggregator(SampleCount(), **kwargs),
    "oracle": lambda **kwargs: MixtureAggregator(TaskGraph(TASKS), **kwargs),
    "fixed": lambda **kwargs: MixtureAggregator(FixedMatrix({a: dict.fromkeys(IDS, 1.0) for a in IDS}), **kwargs),
    "median": lambda **kwargs: RobustAggregator(**kwargs),
    "median for all": lambda **kwargs: RobustAggregator(global_branch=False, warm_start=True, **kwargs),
    "trimmed mean": lambda **kwargs: RobustAggregator(TrimmedMean(), **kwargs),
    "krum": lambda **kwargs: RobustAggregator(Krum(), **kwargs),
    "clipped relevance": lambda **kwargs: RobustAggregator(ClippedRelevance(), **kwargs),
    "products": lambda **kwargs: FedAvg(conventional=ProductMean(), **kwargs),
    "products by relevance": lambda **kwargs: RelevanceAggregator(
        warm_start=Uniform(include_self=True), global_branch=True, conventional=ProductMean(), **kwargs
    ),
    "stacked": lambda **kwargs: Stacking(**kwargs),
    "distilled": lambda **kwargs: Distilled(FedAvg(**kwargs), MeanPredictions()),
    "fresh uploads only": lambda **kwargs: UniformAggregator(max_staleness=0, **kwargs),
}
every_aggregator = pytest.mark.parametrize("make", AGGREGATORS.values(), ids=AGGREGATORS.keys())


def update(client, round=0, *, seed=0, sketch=True, architecture=None, num_examples=None):
    """One client's update: P and Q for all, A of its architecture's width; the first two ids are one architecture."""
    index = IDS.index(client)
    generator = torch.Generator().manual_seed(1000 * seed + 10 * round + index)
    wide = architecture or ("wide" if index < 2 else "narrow")
    common = {
        f"language/{block}/q/{name}": torch.randn(shape, generator=generator)
        for block in range(2)
        for name, shape in (("P", (3, 3)), ("Q", (3,)))
    }
    if wide == "narrow":
        common["language/0/gate/P"] = torch.randn(3, 3, generator=generator)
    width = 8 if wide == "wide" else 5
    bound = {
        "layers.0.q.A": torch.randn(3, width, generator=generator),
        "layers.0.q.B": torch.randn(width, 3, generator=generator),
        "layers.0.bias": torch.randn(width, generator=generator),
    }
    return ClientUpdate(
        client_id=client,
        round=round,
        num_examples=index + 1 if num_examples is None else num_examples,
        architecture=wide,
        shared=SharedTensors(FlatTensors.pack(common), FlatTensors.pack(bound)),
        sketch=torch.randn(32, generator=generator) if sketch else None,
        metrics={"val_loss": 1.0},
    )


def tensors(value):
    """All tensors of nested containers and dataclasses, in a fixed order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for key in sorted(value) for tensor in tensors(value[key])]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [tensor for name in sorted(value.__dataclass_fields__) for tensor in tensors(getattr(value, name))]
    return []


def same(one, two):
    """Equal to the last bit, tensor by tensor."""
    left, right = tensors(one), tensors(two)
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@every_aggregator
def test_the_order_of_updates_changes_no_bit(make):
    """Clients finish in any order; the result is a function of the set."""
    updates = [update(client) for client in IDS]
    first = make().aggregate(updates, {})

    for order in ([4, 2, 0, 1, 3], [3, 1, 4, 0, 2]):
        other = make().aggregate([updates[index] for index in order], {})
        assert list(other.client_ids) == list(first.client_ids) == sorted(IDS)
        assert same(other, first)


@every_aggregator
def test_inputs_are_left_alone_and_results_share_no_memory_with_them(make):
    """Overwriting all that came out changes nothing that went in, and the other way round."""
    aggregator = make()
    state = aggregator.aggregate([update(client) for client in IDS], {}).state
    updates = [update(client, 1) for client in IDS[:3]]
    before = copy.deepcopy((updates, state))

    result = aggregator.aggregate(updates, state)
    assert same(before, (updates, state))
    for tensor in tensors([result.personalized, result.newcomer]):
        tensor.fill_(99.0)
    assert same(before, (updates, state))

    kept = copy.deepcopy(result.state)
    for tensor in tensors(updates):
        tensor.fill_(77.0)
    assert same(kept, result.state)


@every_aggregator
def test_what_is_sent_may_be_written_to_without_changing_the_state(make):
    """A client in this process that trains what it received must not train the server's memory."""
    result = make().aggregate([update(client) for client in IDS], {})
    kept = copy.deepcopy(result.state)

    for tensor in tensors([result.personalized, result.newcomer]):
        tensor.fill_(99.0)

    assert same(kept, result.state)


@every_aggregator
def test_a_run_that_stops_and_resumes_gives_the_same_bits(make):
    """The state goes through a file, read with ``weights_only=True``, and nothing else is remembered."""
    rounds = [[update(client, round) for client in IDS if (IDS.index(client) + round) % 3] for round in range(4)]
    straight = {}
    for updates in rounds:
        result = make().aggregate(updates, straight)
        straight = result.state

    resumed = {}
    for updates in rounds:
        again = make().aggregate(updates, resumed)
        file = io.BytesIO()
        torch.save(again.state, file)
        file.seek(0)
        resumed = torch.load(file, weights_only=True)

    assert same(result, again)
    assert list(result.notes) == list(again.notes)


@every_aggregator
def test_every_known_client_receives_something_it_can_write(make):
    """Names and shapes sent to a client are among those that it uploaded, also when it did not take part.

    Factors of what is frozen may have another rank, since nobody trains them.
    """
    aggregator = make()
    updates = [update(client) for client in IDS]
    uploaded = {item.client_id: item.shared for item in updates}
    state = aggregator.aggregate(updates, {}).state
    result = aggregator.aggregate([update(client, 1) for client in IDS[1:3]], state)

    assert set(result.personalized) == set(IDS)
    for client, personalized in result.personalized.items():
        for sent in (personalized.frozen, personalized.start):
            if sent is not None:
                assert sent.common.layout == uploaded[client].common.layout
                mine, came = uploaded[client].same_architecture, sent.same_architecture
                if sent is personalized.start:
                    assert came.layout == mine.layout
                assert came.layout.names == mine.layout.names
                assert came.layout.factors == mine.layout.factors
                for A, B in mine.layout.factors.values():
                    product = came.unpack()[B] @ came.unpack()[A]
                    assert product.shape == (mine.unpack()[B] @ mine.unpack()[A]).shape
    for sent in (result.newcomer.frozen, result.newcomer.start):
        if sent is not None:
            # the role `gate` is private to one family: a newcomer may lack it
            assert set(sent.common.layout.names) == set(uploaded["alpha"].common.layout.names)
            assert not sent.same_architecture.layout.names


@every_aggregator
def test_the_global_branch_is_filled_exactly_when_there_is_one(make):
    """`frozen` is for aggregators that say so."""
    aggregator = make()
    result = aggregator.aggregate([update(client) for client in IDS], {})

    for personalized in (*result.personalized.values(), result.newcomer):
        assert (personalized.frozen is not None) == aggregator.uses_global_branch


@every_aggregator
def test_weights_are_rows_that_sum_to_one_by_client_id(make):
    """What is drawn and logged is what was mixed."""
    result = make().aggregate([update(client) for client in IDS], {})

    if result.weights is not None:
        assert result.weights.shape == (5, 5)
        torch.testing.assert_close(result.weights.sum(dim=1), torch.ones(5))


@every_aggregator
def test_one_client_alone_keeps_what_it_has(make):
    """Whatever the rule, the mean of one is itself."""
    only = update("alpha")

    personalized = make().aggregate([only], {}).personalized["alpha"]

    for sent in (personalized.frozen, personalized.start):
        if sent is not None:
            torch.testing.assert_close(sent.common.vector, only.shared.common.vector)
            torch.testing.assert_close(sent.same_architecture.vector, only.shared.same_architecture.vector)


@every_aggregator
def test_means_stay_within_what_clients_sent(make):
    """Where all clients hold 1, everybody receives 1: no scale is lost, also for roles that few hold.

    Of two factors that is said of their product, which is all that a rule may keep of them: three times 1 times 1.
    """
    ones = []
    for client in IDS:
        item = update(client)
        item.shared.common.vector.fill_(1.0)
        item.shared.same_architecture.vector.fill_(1.0)
        ones.append(item)

    result = make().aggregate(ones, {})

    for sent in (*result.personalized.values(), result.newcomer):
        for part in (sent.frozen, sent.start):
            if part is None:
                continue
            torch.testing.assert_close(part.common.vector, torch.ones_like(part.common.vector))
            bound = part.same_architecture.unpack()
            for A, B in part.same_architecture.layout.factors.values():
                product = bound.pop(B) @ bound.pop(A)
                torch.testing.assert_close(product, torch.full_like(product, 3.0))
            for value in bound.values():
                torch.testing.assert_close(value, torch.ones_like(value))


@every_aggregator
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_client_that_diverged_is_named_with_its_tensor(make, value):
    """One NaN would be everybody's after the mean."""
    updates = [update(client) for client in IDS]
    updates[2].shared.common.unpack()["language/1/q/Q"][1] = value

    with pytest.raises(RejectedUpdateError, match=r"`delta`.*`language/1/q/Q`"):
        make().aggregate(updates, {})


@every_aggregator
def test_the_guard_of_an_aggregator_leaves_a_diverged_client_out(make):
    """The others' result is the one they get without it, and the note names it."""
    updates = [update(client) for client in IDS]
    updates[2].shared.same_architecture.vector[0] = float("nan")
    aggregator = make(guard=UpdateGuard(max_claim=None))

    seen = aggregator.guard.inspect(updates)
    result = aggregator.aggregate(seen.accepted, {})

    assert same(result.personalized, make().aggregate([*updates[:2], *updates[3:]], {}).personalized)
    assert "`layers.0.bias`" in seen.rejected["delta"]
    assert aggregator.guard == UpdateGuard(max_claim=None)


@every_aggregator
@pytest.mark.parametrize("number", [0, -3, True, 2.5, float("nan")])
def test_a_number_of_examples_that_is_none_is_refused(make, number):
    """It would turn a mean into something else."""
    with pytest.raises(RejectedUpdateError, match=r"`beta`.*num_examples"):
        make().aggregate([update("alpha"), update("beta", num_examples=number)], {})


@every_aggregator
def test_two_updates_of_one_client_are_refused(make):
    """Which one would count?"""
    with pytest.raises(ValueError, match="alpha"):
        make().aggregate([update("alpha"), update("alpha", seed=1)], {})


@every_aggregator
def test_a_state_of_another_rule_is_refused(make):
    """Resuming with another aggregator must not silently start anew."""
    with pytest.raises(CheckpointMismatchError, match="krum"):
        make().aggregate([update("alpha")], {"rule": "krum"})


@every_aggregator
def test_a_newcomer_in_a_later_round_joins(make):
    """Its row and column appear, the others' do not get lost."""
    aggregator = make()
    state = aggregator.aggregate([update(client) for client in ("omega", "beta")], {}).state

    result = aggregator.aggregate([update("alpha", 1)], state)

    assert list(result.client_ids) == ["alpha", "beta", "omega"]
    assert set(result.personalized) == {"alpha", "beta", "omega"}
