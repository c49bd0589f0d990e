"""The protocol of `benchmarks/attacks.py`: with a fifth of the clients lying, the honest keep their scores."""

from dataclasses import replace
from functools import cache

import pytest

from benchmarks.attacks import ATTACKS, FOR_ALL, PERSONAL, Protocol, behave, run

FULL = Protocol()
ONE_TASK = replace(FULL, shared=0.9, private=0.3)
SEEDS = range(5)


def test_the_protocol_is_the_one_that_is_promised():
    assert FULL.test == 2000
    assert FULL.num_attackers == 0.2 * FULL.num_clients
    assert len(FULL.widths) == 2


@cache
def score(make, protocol, attack, wrong_labels, seed):
    """Of the honest clients, in percent."""
    return run(protocol, make(protocol.num_attackers), attack, wrong_labels=wrong_labels, seed=seed)


def cost(rules, rule, attack, protocol=FULL):
    """Percentage points that the honest clients lose, paired over seeds."""
    make, (do, wrong_labels) = rules[rule], ATTACKS[attack]
    lost = [
        score(make, protocol, behave, False, seed) - score(make, protocol, do, wrong_labels, seed) for seed in SEEDS
    ]
    return sum(lost) / len(lost)


@pytest.mark.parametrize("rule", ["`CoordinateMedian`", "`TrimmedMean`", "`Krum`", "`ClippedRelevance`"])
@pytest.mark.parametrize("attack", ["sign flip x8", "scaling x8", "label flip", "collusion", "relevance, mean"])
def test_a_fifth_of_liars_costs_the_honest_at_most_two_points(rule, attack):
    assert cost(PERSONAL, rule, attack) <= 2.0


@pytest.mark.parametrize(("rule", "attack"), [("uniform", "sign flip x8"), ("relevance", "relevance, mean")])
def test_the_attacks_hurt_where_nothing_stands_against_them(rule, attack):
    """Else the test above would be one of harmless attacks."""
    assert cost(PERSONAL, rule, attack) > 5.0


def test_crude_scaling_does_not_pass_the_guard_of_a_plain_mean():
    assert cost(FOR_ALL, "FedAvg", "scaling x1000", ONE_TASK) <= 2.0
