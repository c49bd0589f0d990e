"""Promises of `lightning_pfl.aggregation.guard`: what is left out, what is cut, and what is fine."""

import math

import pytest
import torch

from lightning_pfl.aggregation import FedAvg
from lightning_pfl.aggregation.faults import Expectation
from lightning_pfl.aggregation.guard import UpdateGuard
from lightning_pfl.errors import RejectedUpdateError
from lightning_pfl.types import ClientUpdate, FlatTensors, Layout, SharedTensors

NAN = float("nan")


def update(client, values=(1.0, 1.0), *, number=100, bound=None, sketch=None, round=0, architecture="one"):
    common = FlatTensors.pack({"language/0/q/Q": torch.tensor(values, dtype=torch.float32)})
    own = FlatTensors.empty() if bound is None else FlatTensors.pack({"layers.0.q/A": torch.tensor(bound)})
    return ClientUpdate(client, round, number, architecture, SharedTensors(common, own), sketch)


def honest(count=4, **arguments):
    return [update(f"ward-{index}", (1.0 + 0.1 * index, 1.0), **arguments) for index in range(count)]


def rejected(*updates, guard=None, **known):
    return (guard or UpdateGuard()).inspect(updates, **known).rejected


# -- each update by itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sketch", "word"),
    [
        (torch.tensor([1.0, NAN]), "finite"),
        (torch.ones(2, 2), r"\(2, 2\)"),
        (torch.ones(2, dtype=torch.bfloat16), "bfloat16"),
        (torch.ones(0), r"\(0,\)"),
    ],
)
def test_a_sketch_that_is_none_is_refused(sketch, word):
    """NaN, a matrix, another dtype, nothing."""
    with pytest.raises(RejectedUpdateError, match=f"`a` in round 3.*{word}"):
        UpdateGuard().accept([update("a", round=3, sketch=sketch)])
    assert list(rejected(update("a", sketch=sketch), *honest())) == ["a"]


def test_many_faulty_tensors_are_counted_not_listed():
    """A message stays readable when all of a client's 48 tensors are NaN."""
    names = {f"language/{block}/q/P": torch.full((2, 2), NAN) for block in range(48)}

    with pytest.raises(RejectedUpdateError, match="and 44 more"):
        UpdateGuard().accept([ClientUpdate("a", 0, 1, "one", SharedTensors(FlatTensors.pack(names)))])


def test_a_vector_that_is_shorter_than_its_layout_is_left_out():
    """What came as bytes was not checked when it was made: numbers would be taken for other tensors'."""
    item = update("short")
    object.__setattr__(item.shared.common, "vector", torch.ones(1))

    assert "float32 of shape (2,)" in rejected(item, *honest())["short"]


def test_a_client_that_hardly_moves_does_not_make_two_others_suspicious():
    """A schedule may begin with a tiny step; two who differ by a factor of a million say nothing of a third."""
    assert rejected(update("still", (1e-6, 1e-6)), *honest(2)) == {}


# -- against what is expected of a client ------------------------------------------------------------------------------


def expect(**arguments):
    layouts = (Layout(("language/0/q/Q",), ((2,),)), Layout())
    return {"ward-9": Expectation(**{"round": 0, "architecture": "one", "layouts": layouts, **arguments})}


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (update("ward-9", (1.0,)), r"(1,) instead of (2,)"),
        (update("ward-9", (1.0, 1.0), bound=[1.0]), "`layers.0.q/A` differ ((1,) instead of absent)"),
        (update("ward-9", architecture="two"), "must be `one`, but is `two`"),
        (update("ward-9", round=4), "must be of round 0, but says 4"),
        (update("ward-9", sketch=torch.ones(3)), "must have 2 numbers, but has 3"),
    ],
    ids=["shape", "name", "base model", "round", "sketch"],
)
def test_what_was_not_asked_for_is_left_out(item, reason):
    """Another rank would be broadcast into the mean, another base model mixed as if it meant the same."""
    assert reason in rejected(item, *honest(), expected=expect(sketch_size=2))["ward-9"]
    assert not rejected(update("ward-9"), *honest(), expected=expect(sketch_size=2))


def test_an_unknown_client_must_have_the_shapes_that_others_have():
    """A model that is built on the client is not known before; its P must still be of the federation's rank."""
    assert "(1,)" in rejected(update("late", (1.0,)), *honest(), expected=expect())["late"]


def test_the_sketch_that_most_clients_send_has_the_right_length():
    sketches = [update(f"ward-{index}", sketch=torch.ones(8)) for index in range(3)]
    assert list(rejected(*sketches, update("odd", sketch=torch.ones(16)))) == ["odd"]


# -- against the other clients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [2, 3, 9, 40])
def test_a_step_that_is_much_larger_than_the_others_is_left_out(others):
    """With two others as with forty; the honest ones stay although one of two that they see is absurd."""
    seen = UpdateGuard().inspect([*honest(others), update("scaled", (300.0, 300.0))])

    assert list(seen.rejected) == ["scaled"]
    assert "root mean square) is 300, but judged by the others' at most" in seen.rejected["scaled"]
    assert len(seen.accepted) == others


def test_a_minority_of_absurd_steps_is_left_out_together():
    """Four of ten collude; the median does not move."""
    items = [*honest(6), *(update(f"x-{index}", (1e6, 1e6)) for index in range(4))]
    assert list(rejected(*items)) == [f"x-{index}" for index in range(4)]


def test_honest_steps_of_very_different_sizes_stay():
    """Clients have between 1 and 1000 steps to go: the spread is the federation's own, and the fence follows it."""
    items = [update(f"ward-{index}", (10.0 ** (index / 4),) * 2) for index in range(13)]
    assert not rejected(*items)


def test_with_one_other_client_nobody_is_judged_by_size_until_there_is_a_history():
    """Of two, either may be the absurd one."""
    first = UpdateGuard().inspect([update("a"), update("b", (99.0, 99.0))])
    assert not first.rejected

    calm = UpdateGuard().inspect([update("a"), update("b")])
    later = UpdateGuard().inspect([update("a", round=1), update("b", (99.0, 99.0), round=1)], measures=calm.measures)
    assert list(later.rejected) == ["b"]


def test_a_step_is_measured_from_where_the_client_set_out():
    """A shared encoder is far from zero on all clients; what counts is how far each went."""
    begun = SharedTensors(FlatTensors.pack({"language/0/q/Q": torch.tensor([50.0, 50.0])}))
    names = [f"ward-{index}" for index in range(5)]
    known = {name: Expectation(start=begun) for name in names}
    items = [update(name, (50.0 + 0.01 * (index + 1), 50.0)) for index, name in enumerate(names[:4])]

    assert list(rejected(*items, update("ward-4", (60.0, 50.0)), expected=known)) == ["ward-4"]
    assert not rejected(*items, update("ward-4", (60.0, 50.0)))  # from zero the difference does not show


def test_a_part_that_few_numbers_make_is_judged_apart():
    """P among many As: a thousandfold P would vanish in one norm over both."""
    wide = [1.0] * 1000
    items = [update(f"ward-{index}", bound=wide) for index in range(4)]

    found = rejected(*items, update("x", (30.0, 30.0), bound=wide))

    assert "tensors for all clients" in found["x"]


def test_a_sketch_that_would_own_the_running_mean_is_left_out():
    """The server averages a client's sketches over rounds; cosines would hide the size."""
    items = [update(f"ward-{index}", sketch=torch.ones(4)) for index in range(4)]
    assert "sketch's norm" in rejected(*items, update("x", sketch=torch.full((4,), 1e6)))["x"]


def test_clients_that_changed_nothing_say_nothing_about_the_others():
    idle = [update(f"idle-{index}", (0.0, 0.0)) for index in range(3)]
    assert not rejected(*idle, *honest(3))


def test_steps_may_be_left_unjudged():
    assert not rejected(*honest(), update("scaled", (1e6, 1e6)), guard=UpdateGuard(max_step=None))


def test_the_order_of_updates_changes_nothing():
    items = [*honest(5), update("liar", number=10**9), update("scaled", (1e3, 1e3))]
    one, other = (UpdateGuard().inspect(order) for order in (items, items[::-1]))

    assert [item.client_id for item in one.accepted] == [item.client_id for item in other.accepted]
    assert (one.rejected, one.notes, one.measures) == (other.rejected, other.notes, other.measures)


def test_what_is_remembered_is_bounded_and_leaves_out_the_rejected():
    measures = {}
    for _ in range(40):
        seen = UpdateGuard().inspect([*honest(4), update("scaled", (1e3, 1e3))], measures=measures)
        measures = seen.measures

    assert {name: len(sizes) for name, sizes in measures.items()} == {"common": 64, "examples": 64}
    assert max(measures["common"]) < 2


# -- claims of examples ------------------------------------------------------------------------------------------------


def share(updates, client):
    """A client's weight in the sample-weighted mean."""
    counts = {item.client_id: item.num_examples for item in UpdateGuard().inspect(updates).accepted}
    return counts[client] / sum(counts.values())


@pytest.mark.parametrize(("others", "most"), [(1, 10 / 11), (2, 1 / 2), (4, 1 / 2), (19, 10 / 29)])
def test_a_client_that_claims_a_billion_examples_does_not_own_the_mean(others, most):
    """By hand: ten times the median of 100, and not more than all others together where there are two others."""
    assert share([*honest(others), update("liar", number=10**9)], "liar") == pytest.approx(most)


def test_a_mean_of_colluding_claims_is_bounded_too():
    items = [*honest(16), *(update(f"liar-{index}", number=10**9) for index in range(4))]
    counts = {item.client_id: item.num_examples for item in UpdateGuard().inspect(items).accepted}
    assert [counts[f"liar-{index}"] for index in range(4)] == [1000] * 4


def test_a_claim_that_is_cut_is_said_and_its_client_counts():
    seen = UpdateGuard().inspect([*honest(), update("liar", number=10**9)])

    assert "liar" in {item.client_id for item in seen.accepted}
    assert "`liar` claims 1000000000 examples and counts with 400" in seen.notes[0]


def test_honest_counts_of_a_skewed_federation_are_left_as_they_are():
    """Sizes as of a Dirichlet split: from 10 to 3427, spread evenly."""
    counts = [int(10 * 1.7**index) for index in range(12)]
    seen = UpdateGuard().inspect([update(f"ward-{index:02d}", number=count) for index, count in enumerate(counts)])

    assert [item.num_examples for item in seen.accepted] == counts
    assert not seen.notes


def test_what_the_server_itself_knows_is_no_claim():
    known = {"large": Expectation(counted=True)}
    seen = UpdateGuard().inspect([*honest(), update("large", number=10**9)], expected=known)
    assert {item.client_id: item.num_examples for item in seen.accepted}["large"] == 10**9


def test_claims_may_be_taken_as_they_are():
    seen = UpdateGuard(max_claim=None).inspect([*honest(), update("liar", number=10**9)])
    assert {item.client_id: item.num_examples for item in seen.accepted}["liar"] == 10**9


# -- what follows ------------------------------------------------------------------------------------------------------


def test_a_nan_does_not_reach_the_mean_of_the_others():
    seen = UpdateGuard().inspect([*honest(3), update("broken", (NAN, 1.0))])

    result = FedAvg().aggregate(seen.accepted, {})

    # by hand: the mean of 1.0, 1.1 and 1.2
    torch.testing.assert_close(result.personalized["ward-0"].start.common.vector, torch.tensor([1.1, 1.0]))
    assert "broken" not in result.personalized


def test_a_strict_guard_names_all_and_ends_the_run():
    with pytest.raises(RejectedUpdateError, match=r"`broken` in round 0: .*; client `scaled` in round 0: "):
        UpdateGuard(strict=True).inspect([*honest(3), update("scaled", (1e3, 1e3)), update("broken", (NAN, 1.0))])


@pytest.mark.parametrize("arguments", [{"max_step": 0.5}, {"max_claim": math.nan}, {"spreads": -1.0}])
def test_bounds_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
        UpdateGuard(**arguments)


def test_two_updates_of_one_client_are_refused():
    with pytest.raises(ValueError, match=r"\['a'\] sent more than one"):
        UpdateGuard().inspect([update("a"), update("a")])
