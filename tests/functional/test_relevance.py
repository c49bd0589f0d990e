"""Promises of `lightning_pfl.functional.relevance`."""

import math

import pytest
import torch

from lightning_pfl.functional.relevance import (
    FixedMatrix,
    Peers,
    SampleCount,
    Softmax,
    TaskGraph,
    TopK,
    Uniform,
)

FOUR = ("a", "b", "c", "d")
SIMILARITY = torch.tensor(
    [
        [1.0, 0.9, 0.3, 0.3],
        [0.9, 1.0, 0.2, 0.4],
        [0.3, 0.2, 1.0, 0.8],
        [0.3, 0.4, 0.8, 1.0],
    ]
)
POLICIES = [
    Softmax(),
    Softmax(0.5, standardize=False),
    Softmax(0.05, standardize=False, include_self=True),
    Uniform(),
    Uniform(include_self=True),
    SampleCount(),
    TopK(2),
    FixedMatrix({"a": {"b": 2.0, "d": 1.0}, "b": {}, "c": {"c": 1.0}, "d": {"a": 1.0}}),
    TaskGraph({"a": ["x"], "b": ["x", "y"], "c": ["y"], "d": ["z"]}),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_rows_sum_to_one_and_hold_nothing_negative(policy):
    """A mixture is a mean."""
    rows = policy.rows(Peers.fresh(FOUR, num_examples=[1, 2, 3, 4], similarity=SIMILARITY))

    torch.testing.assert_close(rows.sum(dim=1), torch.ones(4, dtype=torch.float64))
    assert (rows >= 0).all()


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_who_is_alone_keeps_its_own(policy):
    """One client, or one whose peers' uploads are too old: its row is its own."""
    alone = Peers.fresh(["a"], similarity=torch.ones(1, 1))
    stale = Peers(("a", "b"), (1, 1), sources=(False, False), similarity=torch.ones(2, 2), sketched=(True, True))

    torch.testing.assert_close(policy.rows(alone), torch.eye(1, dtype=torch.float64))
    torch.testing.assert_close(policy.rows(stale), torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_an_upload_that_is_too_old_is_in_nobody_elses_row(policy):
    """`sources` closes a column, except for the client itself."""
    peers = Peers(FOUR, (1, 2, 3, 4), (True, False, True, True), SIMILARITY, (True,) * 4)

    column = policy.rows(peers)[:, 1]

    assert column[[0, 2, 3]].tolist() == [0.0, 0.0, 0.0]


def test_softmax_without_standardising_is_the_papers():
    """By hand, row a at temperature 0.5: exp(1.8), exp(0.6), exp(0.6) over the others."""
    rows = Softmax(0.5, standardize=False).rows(Peers.fresh(FOUR, similarity=SIMILARITY))

    high, low = math.exp(1.8), math.exp(0.6)
    expected = torch.tensor([0.0, high, low, low], dtype=torch.float64) / (high + 2 * low)
    torch.testing.assert_close(rows[0], expected, atol=1e-6, rtol=0)


def test_standardised_rows_do_not_depend_on_the_level_and_spread_of_the_cosines():
    """0.5 + 0.1 c carries the same order and contrast as c; the paper's softmax flattens it to nearly uniform."""
    flat = (0.5 + 0.1 * SIMILARITY).fill_diagonal_(1.0)
    policy = Softmax(0.5)

    rows = policy.rows(Peers.fresh(FOUR, similarity=SIMILARITY))
    flat_rows = policy.rows(Peers.fresh(FOUR, similarity=flat))

    torch.testing.assert_close(flat_rows, rows, atol=1e-5, rtol=0)
    assert rows[0, 1] > 0.9
    assert Softmax(0.5, standardize=False).rows(Peers.fresh(FOUR, similarity=flat))[0, 1] < 0.37


def test_cosines_that_differ_by_rounding_only_give_a_uniform_row():
    """Standardising must not blow up the seventh digit."""
    noisy = torch.full((4, 4), 0.7) + 1e-7 * torch.arange(16.0).reshape(4, 4)

    rows = Softmax(0.5).rows(Peers.fresh(FOUR, similarity=noisy))

    torch.testing.assert_close(rows, Uniform().rows(Peers.fresh(FOUR)), atol=1e-3, rtol=0)


def test_a_client_without_a_sketch_has_a_uniform_row_and_counts_as_average_elsewhere():
    """d is silent. Row a at temperature 0.5: d stands at the mean of .9 and .3, so exp(1.8), exp(.6), exp(1.2)."""
    peers = Peers(FOUR, (1,) * 4, (True,) * 4, SIMILARITY, (True, True, True, False))

    rows = Softmax(0.5, standardize=False).rows(peers)

    third = 1 / 3
    torch.testing.assert_close(rows[3], torch.tensor([third, third, third, 0.0], dtype=torch.float64))
    masses = torch.tensor([0.0, math.exp(1.8), math.exp(0.6), math.exp(1.2)], dtype=torch.float64)
    torch.testing.assert_close(rows[0], masses / masses.sum(), atol=1e-6, rtol=0)


def test_a_very_low_temperature_neither_overflows_nor_empties_a_row():
    """All weight on the most similar."""
    rows = Softmax(1e-6, standardize=False).rows(Peers.fresh(FOUR, similarity=SIMILARITY))

    torch.testing.assert_close(rows[0], torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64))


def test_top_k_keeps_the_largest_and_scales_them_up():
    """Rows of sample counts 1, 2, 3, 4: for a the two largest of 2, 3, 4 are 3 and 4."""
    rows = TopK(2, SampleCount()).rows(Peers.fresh(FOUR, num_examples=[1, 2, 3, 4]))

    torch.testing.assert_close(rows[0], torch.tensor([0.0, 0.0, 3 / 7, 4 / 7], dtype=torch.float64))


def test_top_k_of_equal_weights_takes_the_first_ids():
    """A tie is broken the same way every time."""
    rows = TopK(1, Uniform()).rows(Peers.fresh(FOUR))

    assert rows.argmax(dim=1).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("policy", "word"),
    [(FixedMatrix({"a": {"b": 1.0}}), "fixed matrix"), (TaskGraph({"a": ["x"]}), "task graph")],
)
def test_a_written_policy_that_does_not_know_a_client_names_it(policy, word):
    """A typo in an id must not silently isolate a client."""
    with pytest.raises(ValueError, match=rf"(?s){word}.*\['b'\]"):
        policy.rows(Peers.fresh(["a", "b"]))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_softmax_refuses_a_temperature_that_is_not_positive(temperature):
    """The message says what to take instead."""
    with pytest.raises(ValueError, match=r"temperature.*Uniform"):
        Softmax(temperature)


def test_a_fixed_matrix_refuses_negative_weights():
    """It names the pair."""
    with pytest.raises(ValueError, match=r"`b` for `a` is -1"):
        FixedMatrix({"a": {"b": -1.0}})


def test_a_task_graph_refuses_a_bare_text_as_tasks():
    """Its letters would count as tasks."""
    with pytest.raises(ValueError, match="flags"):
        TaskGraph({"a": "flags"})
