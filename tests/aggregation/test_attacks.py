"""The quick version of `benchmarks/attacks.py`: with a fifth of the clients lying, the honest keep their scores."""

from dataclasses import replace

import pytest

from benchmarks.attacks import ATTACKS, FOR_ALL, PERSONAL, Protocol, behave, run

QUICK = Protocol(rounds=5, test=500)
ONE_TASK = replace(QUICK, shared=0.9, private=0.3)
SEEDS = (0, 1)


def cost(rules, rule, attack, protocol=QUICK):
    """Percentage points that the honest clients lose, paired over seeds."""
    do, wrong_labels = ATTACKS[attack]
    lost = []
    for seed in SEEDS:
        clean = run(protocol, rules[rule](protocol.num_attackers), behave, wrong_labels=False, seed=seed)
        attacked = run(protocol, rules[rule](protocol.num_attackers), do, wrong_labels=wrong_labels, seed=seed)
        lost.append(clean - attacked)
    return sum(lost) / len(lost)


@pytest.mark.parametrize("rule", ["`CoordinateMedian`", "`TrimmedMean`", "`ClippedRelevance`"])
@pytest.mark.parametrize("attack", ["sign flip x8", "scaling x8", "label flip", "collusion", "relevance, mean"])
def test_a_fifth_of_liars_costs_the_honest_at_most_two_points(rule, attack):
    assert cost(PERSONAL, rule, attack) <= 2.0


@pytest.mark.parametrize(("rule", "attack"), [("uniform", "sign flip x8"), ("relevance", "relevance, mean")])
def test_the_attacks_hurt_where_nothing_stands_against_them(rule, attack):
    """Else the test above would be one of harmless attacks."""
    assert cost(PERSONAL, rule, attack) > 5.0


def test_crude_scaling_does_not_pass_the_guard_of_a_plain_mean():
    assert cost(FOR_ALL, "FedAvg", "scaling x1000", ONE_TASK) <= 2.0
