"""Promises of `lightning_pfl.functional.accounting`."""

import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pfl.functional.accounting import Account, Ledger, PrivacyBudget

multipliers = st.floats(0.3, 100)


def delta_of(epsilon, multiplier):
    """Balle and Wang, theorem 8, written out: sensitivity 1, standard deviation z."""

    def phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    half, rest = 1 / (2 * multiplier), epsilon * multiplier
    return phi(half - rest) - math.exp(epsilon) * phi(-half - rest)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(multipliers, st.integers(1, 50)), min_size=1, max_size=5))
def test_releases_cost_what_the_one_equivalent_release_costs(releases):
    """The likelihood ratios of independent Gaussians add up to that of one with 1/z² summed."""
    account = Account()
    for multiplier, times in releases:
        account = account.add(multiplier, times=times)

    one = 1 / math.sqrt(sum(times / multiplier**2 for multiplier, times in releases))
    assert account.multiplier == pytest.approx(one, rel=1e-12)
    assert account.epsilon(1e-5) == pytest.approx(Account().add(one).epsilon(1e-5), rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(multipliers, st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_epsilon_is_where_the_exact_delta_of_a_gaussian_is_the_budgets(multiplier, delta):
    epsilon = Account().add(multiplier).epsilon(delta)

    if epsilon > 0 and epsilon < 300:
        assert delta_of(epsilon, multiplier) == pytest.approx(delta, rel=1e-4)


def test_a_multiplier_is_relative_to_the_sensitivity_of_replacing_a_unit():
    """By the textbook's bound: sigma = sqrt(2 ln(1.25/delta)) / epsilon suffices for epsilon below 1, and not half."""
    sigma = math.sqrt(2 * math.log(1.25 / 1e-5)) / 0.9

    assert Account().add(sigma).epsilon(1e-5) < 0.9
    assert Account().add(sigma / 2).epsilon(1e-5) > 0.9


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 50), st.sampled_from([1e-3, 1e-5, 1e-8]), st.integers(1, 500))
def test_a_noise_multiplier_meets_its_budget_and_wastes_none(epsilon, delta, releases):
    """All releases one after the other are allowed, and with a millionth less noise they are not."""
    budget = PrivacyBudget(epsilon, delta)

    multiplier = budget.noise_multiplier(releases=releases)

    assert budget.allows(Account().add(multiplier, times=releases))
    assert not budget.allows(Account().add(multiplier * (1 - 1e-6), times=releases))


def test_one_release_after_the_other_costs_what_all_at_once_cost():
    """To the last bit, or a budget for 20 rounds might end in the 20th."""
    budget = PrivacyBudget(8, 1e-5)
    multiplier, account = budget.noise_multiplier(releases=20), Account()
    for _ in range(20):
        account = account.add(multiplier)

    assert account == Account().add(multiplier, times=20)
    assert budget.allows(account)
    assert not budget.allows(account.add(multiplier))


def test_nothing_released_costs_nothing():
    assert Account().epsilon(1e-5) == 0
    assert Account().multiplier == math.inf


def test_the_same_bytes_sent_again_are_not_counted_again_and_others_are():
    """By hand: round 0 sends a and b; again a and b; then a and c, of which only c is new; then a of long ago."""
    ledger = Ledger().after({"a": 4.0, "b": 8.0}, round=0)
    assert ledger.after({"a": 4.0, "b": 8.0}, round=0) is ledger

    ledger = ledger.after({"a": 4.0, "c": 8.0}, round=1)
    assert ledger.account.releases == ((4.0, 1), (8.0, 2))
    ledger = ledger.after({"d": 4.0}, round=2).after({"a": 4.0}, round=3)
    assert ledger.account.releases == ((4.0, 3), (8.0, 2))
    assert ledger.round == 3


def test_a_ledger_survives_a_checkpoint():
    ledger = Ledger().after({"a": 4.0, "b": 0.1 + 0.2}, round=7)

    assert Ledger.load(ledger.dump()) == ledger


@pytest.mark.parametrize(("epsilon", "delta"), [(0, 1e-5), (-1, 1e-5), (math.nan, 1e-5), (1, 0), (1, 1), (1, math.nan)])
def test_a_budget_out_of_range_is_refused(epsilon, delta):
    with pytest.raises(ValueError, match="A budget needs epsilon > 0"):
        PrivacyBudget(epsilon, delta)


def test_an_unlimited_budget_allows_everything_and_says_nothing_of_noise():
    budget = PrivacyBudget(math.inf, 1e-5)

    assert budget.allows(Account().add(1e-6))
    with pytest.raises(ValueError, match="finite epsilon"):
        budget.noise_multiplier(releases=1)
    with pytest.raises(ValueError, match="at least one release"):
        PrivacyBudget(1, 1e-5).noise_multiplier(releases=0)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    """When the budget is made, not after a round."""
    monkeypatch.setitem(sys.modules, "dp_accounting", None)

    with pytest.raises(ImportError, match=r"pip install 'lightning-pfl\[privacy\]'"):
        PrivacyBudget(8, 1e-5)
