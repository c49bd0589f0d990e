"""Settings of rounds: what they mean in numbers, and what is refused."""

import math

import pytest

from lightning_pfl.federation.pools import Pace
from lightning_pfl.federation.rules import DropLate, RetryRound, RoundRules, Shortfall, SkipRound, StopRun, UseLate


@pytest.mark.parametrize(
    ("quorum", "wanted", "needed"), [(None, 7, 7), (0.5, 7, 4), (0.3, 10, 3), (0.01, 10, 1), (1.0, 10, 10)]
)
def test_a_quorum_is_a_share_of_the_wanted_rounded_up(quorum, wanted, needed):
    """3 of 10 are 0.3, whatever 0.3 * 10 is in floating point."""
    assert RoundRules(quorum=quorum).needed(wanted) == needed


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"deadline": 0}, ValueError, "`deadline` is a number of seconds above 0"),
        ({"deadline": math.inf}, ValueError, "`deadline` is a number of seconds above 0"),
        ({"quorum": 0}, ValueError, "`quorum` is a share of the wanted updates, above 0 to 1, but is 0"),
        ({"quorum": 1.5}, ValueError, "`quorum` is a share"),
        ({"quorum": math.nan}, ValueError, "`quorum` is a share"),
        ({"over_select": -0.1}, ValueError, "`over_select` is a share of clients, at least 0, but is -0.1"),
        ({"late": "drop"}, TypeError, "`late` must be a LateResults, but is 'drop'"),
        ({"below_quorum": SkipRound}, TypeError, "`below_quorum` must be a BelowQuorum"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        RoundRules(**arguments)


def test_limits_of_late_results_retries_and_paces_are_checked():
    with pytest.raises(ValueError, match=r"`max_rounds` must be at least 1, but is 0. For 0 take `DropLate\(\)`"):
        UseLate(0)
    with pytest.raises(ValueError, match=r"`times` must be at least 1, but is 0. Not to retry, take `SkipRound\(\)`"):
        RetryRound(0, then=SkipRound())
    for wrong in ({"seconds": -1.0}, {"seconds": math.nan}, {"upload": 0.0}, {"download": -5.0}):
        with pytest.raises(ValueError, match="seconds of at least 0 and bytes per second above 0"):
            Pace(**wrong)


def test_the_defaults_wait_for_everybody_and_stop():
    assert RoundRules() == RoundRules(
        deadline=None, quorum=None, over_select=0.0, late=DropLate(), below_quorum=StopRun()
    )


def test_a_shortfall_of_many_names_the_first_few():
    missing = {f"ward-{number}": "is late" for number in range(12)}
    text = str(Shortfall(3, 1, 20, 8, missing))

    assert text.startswith("Round 3 has 8 of the 20 updates that it needs (`ward-0` is late; ")
    assert text.endswith("`ward-7` is late; and 4 more)")
