"""What a report says, worked by hand from recorded runs."""

import dataclasses
import math

import pytest

from lightning_pfl.comparison.evaluation import AGGREGATED, TRAINED
from lightning_pfl.comparison.newcomers import Arrival
from lightning_pfl.comparison.report.findings import Findings
from lightning_pfl.comparison.scores import client_matrix, client_scores, curve
from tests.comparison.recorded import record


@pytest.fixture
def records():
    """Self, seed by seed: local 50, 60, 70; FedAvg 60, 60, 60; ours 70, 75, 80."""
    return [
        record("local", 0, (4, 6), (2, 2), role="local"),
        record("local", 1, (6, 6), (2, 4), role="local"),
        record("local", 2, (7, 7), (3, 3), role="local"),
        record("FedAvg", 0, (6, 6), (5, 5), aggregated=((8, 8), (7, 7))),
        record("FedAvg", 1, (5, 7), (5, 5), aggregated=((8, 8), (7, 7))),
        record("FedAvg", 2, (7, 5), (5, 5), aggregated=((8, 8), (7, 7))),
        record("ours", 0, (7, 7), (4, 4), role="ours", operations=150.0),
        record("ours", 1, (7, 8), (4, 4), role="ours", operations=150.0),
        record("ours", 2, (8, 8), (5, 5), role="ours", operations=150.0),
    ]


def test_scores_count_tasks_and_clients_alike():
    """Client a: 4 of 10 on its own, 2 of 10 on the other's; client b: 6 and 1."""
    one = record("local", 0, (4, 6), (2, 1))
    assert client_scores(one, one.tables[1]) == [(0.4, 0.2), (0.6, 0.1)]
    assert curve(one)[2] == pytest.approx((0.5, 0.15))
    assert client_matrix(one) == [[0.4, 0.2], [0.1, 0.6]]


def test_a_task_that_was_not_asked_counts_for_nothing():
    one = record("local", 0, (4, 6), (2, 1))
    own, others = zip(*client_scores(one, one.tables[0]), strict=True)
    assert own == (0.5, 0.5)
    assert all(math.isnan(value) for value in others)


def test_what_means_hide():
    """Self is .5, .5 after round 1 and .3, .4 after round 2: forgets .2 and .1; its area is half way from .5 to .35."""
    (found,) = Findings.of([record("local", 0, (3, 4), (2, 1), role="local")]).further
    assert {key: round(one.mean, 3) for key, one in found.scores.items() if not key.startswith("others")} == {
        "self_last": 35.0,
        "self_auc": 42.5,
        "forgetting": 15.0,
        "self_worst_decile": 30.0,
        "self_std": 5.0,
    }
    assert found.scores["others_auc"].mean == pytest.approx(15)  # asked in round 2 alone


def test_means_and_deviations_over_seeds(records):
    """Local: 50, 60, 70 has mean 60 and standard deviation 10; t of two degrees of freedom is 4.3027."""
    local = Findings.of(records).rows[0].scores[TRAINED][0]
    assert (local.count, local.mean, local.sd) == (3, pytest.approx(60), pytest.approx(10))
    assert local.half == pytest.approx(4.3027 * 10 / 3**0.5, abs=1e-3)


def test_differences_are_paired_by_seed(records):
    """Ours less local in Self: 20, 15, 10; mean 15, deviation 5, so 15 +- 4.3027 * 5 / sqrt(3) = 12.42."""
    ours = Findings.of(records).rows[2]
    against_local, _ = ours.against[TRAINED]["local"]
    assert against_local.mean == pytest.approx(15)
    assert against_local.half == pytest.approx(12.421, abs=1e-3)
    assert against_local.is_decided


def test_the_best_baseline_is_chosen_per_measure(records):
    """In Self FedAvg and local both have 60, the first of them counts; in Others FedAvg's 50 beats 26.7."""
    findings = Findings.of(records)
    assert findings.references[TRAINED]["baseline Self"] == "local"
    assert findings.references[TRAINED]["baseline Others"] == "FedAvg"
    ours = findings.rows[2]
    assert ours.against[TRAINED]["baseline"][1].mean == pytest.approx(-20 / 3)  # -10, -10 and 0
    assert not ours.against[TRAINED]["baseline"][1].is_decided


def test_the_best_baseline_is_best_on_the_seeds_that_all_have():
    """Seed 0 is easy: late has 80 there and nothing else, steady 90, and 50 with the hard seed."""
    runs = [
        record("late", 0, (8, 8), (3, 3)),
        record("steady", 0, (9, 9), (3, 3)),
        record("steady", 1, (1, 1), (3, 3)),
    ]
    assert Findings.of(runs).references[TRAINED]["baseline Self"] == "steady"


def test_a_method_is_not_compared_with_itself(records):
    local = Findings.of(records).rows[0]
    assert local.against[TRAINED]["local"][0].count == 0


def test_models_after_aggregation_are_told_apart(records):
    fedavg = Findings.of(records).rows[1]
    assert fedavg.scores[TRAINED][0].mean == pytest.approx(60)
    assert fedavg.scores[AGGREGATED][0].mean == pytest.approx(80)


def test_differences_after_aggregation_are_to_who_is_best_then(records):
    """FedAvg has 80 in Self after aggregation; ours 70, 75 and 80."""
    findings = Findings.of(records)
    assert findings.references[AGGREGATED]["baseline Self"] == "FedAvg"
    assert findings.rows[2].against[AGGREGATED]["baseline"][0].mean == pytest.approx(-5)


def test_newcomers_are_averaged_over_tasks_and_told_apart_by_task():
    """Of ten: cats 2, then 6; dogs 4, then 8, on two models; another seed has one more of each everywhere."""
    runs = []
    for seed in (0, 1):
        came = [
            Arrival(task, model, 0.25, [0, 8], [start + seed, start + 4 + seed], 10, {})
            for task, start in (("cats", 2), ("dogs", 4))
            for model in ("llama", "gemma")
        ]
        runs.append(record("ours", seed, (5, 5), (5, 5), newcomers=came))
    findings = Findings.of(runs)
    (line,) = findings.newcomers
    assert {step: point.mean for step, point in line.points.items()} == pytest.approx({0: 35, 8: 75})
    assert line.points[0].sd == pytest.approx(50**0.5)
    cats, dogs = findings.newcomer_tasks
    assert (cats.task, cats.chance, cats.points) == ("cats", 25, pytest.approx({0: 25, 8: 65}))
    assert dogs.points == pytest.approx({0: 45, 8: 85})


def test_curves_have_the_rounds_that_were_asked(records):
    curves = {(one.method, one.measure): one.points for one in Findings.of(records).curves}
    assert list(curves["local", "Self"]) == [1, 2]
    assert list(curves["local", "Others"]) == [2]
    assert curves["local", "Self"][1].mean == pytest.approx(50)


def test_costs_are_relative_to_training_alone(records):
    costs = {one.method: one for one in Findings.of(records).costs}
    assert costs["ours"].operations == pytest.approx(1.5)
    assert costs["ours"].sent == 2000  # the mean of two clients


def test_chance_is_of_own_and_of_others_tasks(records):
    """Client a owns cats (50 %), b dogs (25 %)."""
    assert Findings.of(records).chance == pytest.approx((37.5, 37.5))


def test_relevance_is_compared_with_the_truth_over_pairs():
    """Three clients, a related to b only. Weights (.8, .2), (.6, .4), (.5, .5) against (1, 0), (1, 0), (0, 0)."""
    weights = [[0.0, 0.8, 0.2], [0.6, 0.0, 0.4], [0.5, 0.5, 0.0]]
    truth = [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    one = record("ours", 0, (5, 5), (5, 5), weights=weights, relations=truth)
    (found,) = Findings.of([one]).relevance
    # means .5 and 1/3; sum of products .4 less 6 * .5 / 3 + ... by hand: .3 * 2/3 + .1 * 2/3 + .3/3 + .1/3 = .4
    assert found.of_weights[0] == pytest.approx(0.4 / (0.2 * 4 / 3) ** 0.5, abs=1e-9)
    assert math.isnan(found.of_similarity[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["cats", "mice"]}, "tasks"),
        ({"about": {**record("x", 0, (1, 1), (1, 1)).about, "side": "val"}}, "side"),
    ],
)
def test_runs_of_two_comparisons_make_no_report(changes, message):
    one, other = record("local", 0, (4, 6), (2, 2)), record("FedAvg", 0, (4, 6), (2, 2))
    with pytest.raises(ValueError, match=message):
        Findings.of([one, dataclasses.replace(other, **changes)])


def test_runs_of_two_settings_of_one_method_make_no_report():
    one, other = record("local", 0, (4, 6), (2, 2)), record("local", 1, (4, 6), (2, 2), key="other")
    with pytest.raises(ValueError, match="different settings"):
        Findings.of([one, other])
