"""Accuracies by hand."""

import math

import pytest

from lightning_pfl.demo.scores import Count, Scores, wilson_interval

SCORES = Scores(
    "any",
    {
        "a": {"x": Count(8, 10), "y": Count(1, 10), "z": Count(3, 10)},
        "b": {"x": Count(0, 10), "y": Count(6, 10), "z": Count(6, 10)},
    },
    {"a": "x", "b": "y"},
)


def test_self_is_the_mean_over_clients_of_the_own_task():
    # by hand: (8/10 + 6/10) / 2
    assert SCORES.self_mean() == pytest.approx(0.7)


def test_others_counts_every_task_that_is_not_the_clients_own():
    # by hand: a has (1 + 3) / 20, b has (0 + 6) / 20
    assert SCORES.on_others("a") == Count(4, 20)
    assert SCORES.others_mean() == pytest.approx((0.2 + 0.3) / 2)


def test_the_interval_stays_between_0_and_1_and_narrows_with_more_questions():
    low, high = wilson_interval(Count(10, 10))
    assert low == pytest.approx(10 / (10 + 1.96**2))  # the closed form for p = 1: n / (n + z^2)
    assert high == pytest.approx(1.0)
    narrow = wilson_interval(Count(500, 1000))
    wide = wilson_interval(Count(5, 10))
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 5


def test_nothing_known_is_said_to_be_nothing_known():
    assert wilson_interval(Count(0, 0)) == (0.0, 1.0)
    assert math.isnan(Count(0, 0).share)
