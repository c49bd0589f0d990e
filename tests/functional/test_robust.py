"""Promises of `lightning_pfl.functional.robust`."""

import pytest
import torch

from lightning_pfl.functional.robust import clip_rows, coordinate_median, krum_selection, trimmed_mean, upper_fence

HONEST = torch.tensor([[1.0, 8.0], [2.0, 7.0], [4.0, 6.0], [3.0, 5.0]])


def test_a_median_is_taken_of_every_number_on_its_own():
    """By hand: of 1, 2, 4 the 2; of 8, 7, 6 the 7. Of four, the mean of the middle two."""
    assert coordinate_median(HONEST[:3]).tolist() == [2.0, 7.0]
    assert coordinate_median(HONEST).tolist() == [2.5, 6.5]


@pytest.mark.parametrize("lie", [1e30, -1e30, float("inf")])
def test_three_of_seven_cannot_push_a_median_past_the_honest(lie):
    values = torch.cat([HONEST, torch.full((3, 2), lie)])
    median = coordinate_median(values)
    assert (HONEST.amin(0) <= median).all()
    assert (median <= HONEST.amax(0)).all()


def test_a_trimmed_mean_leaves_out_both_ends():
    """By hand: without the largest and the smallest of each column, (2 + 3) / 2 and (6 + 7) / 2."""
    assert trimmed_mean(HONEST, 1).tolist() == [2.5, 6.5]
    assert trimmed_mean(HONEST, 0).tolist() == [2.5, 6.5]
    assert trimmed_mean(torch.cat([HONEST, torch.tensor([[100.0, -100.0]])]), 1).tolist() == [3.0, 6.0]
    with pytest.raises(ValueError, match="at most 1 can be left out at each end, but `trim` is 2"):
        trimmed_mean(HONEST, 2)


def test_krum_selects_who_lies_near_its_nearest_neighbours():
    """Five near zero, two colluding far away: with n - f - 2 = 3 neighbours, the two have to count honest ones."""
    values = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [50.0], [50.0]])

    # squared distances to the three nearest: 14, 6, 6, 6, 14
    assert krum_selection(values, 2, keep=5).tolist() == [1, 2, 3, 0, 4]
    assert krum_selection(values, 2, keep=1).tolist() == [1]
    with pytest.raises(ValueError, match="selects 1 to 7 of 7"):
        krum_selection(values, 2, keep=8)


def test_krum_takes_the_first_of_equals():
    assert krum_selection(torch.ones(5, 3), 1, keep=2).tolist() == [0, 1]


def test_only_long_rows_are_shortened_and_keep_their_direction():
    clipped = clip_rows(torch.tensor([[30.0, 40.0], [0.3, 0.4], [0.0, 0.0]]), 5.0)
    torch.testing.assert_close(clipped, torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]))
    assert clip_rows(torch.full((1, 2), 1e30), 1.0).isfinite().all()


def test_a_fence_follows_the_spread_of_the_values_but_not_of_a_few():
    """Logs 0, 1, 2, 3, 4: median 2, deviations 2 1 0 1 2, MAD 1: the fence is exp(2 + 6 * 1.4826)."""
    values = [float(torch.tensor(power).exp()) for power in (0.0, 1.0, 2.0, 3.0, 4.0)]
    wide = upper_fence(values, factor=10.0, spreads=6.0)
    assert wide == pytest.approx(float(torch.tensor(2 + 6 * 1.4826, dtype=torch.float64).exp()), rel=1e-4)
    # at least the factor, and one absurd value changes nothing
    assert upper_fence([7.0] * 5, factor=10.0, spreads=6.0) == pytest.approx(70.0)
    assert upper_fence([7.0] * 5 + [1e300], factor=10.0, spreads=6.0) == pytest.approx(70.0)


def test_of_two_values_the_lower_one_decides():
    assert upper_fence([1e9, 2.0], factor=10.0, spreads=0.0) == pytest.approx(20.0)


def test_two_values_that_differ_by_far_say_little_when_not_wary():
    """Logs 0 and 4: middle 2, both deviations 2."""
    values = [1.0, float(torch.tensor(4.0).exp())]
    fence = upper_fence(values, factor=10.0, spreads=6.0, wary=False)
    assert fence == pytest.approx(float(torch.tensor(2 + 6 * 1.4826 * 2, dtype=torch.float64).exp()), rel=1e-4)


def test_values_that_say_nothing_make_no_fence():
    assert upper_fence([], factor=10.0, spreads=6.0) is None
    assert upper_fence([0.0, float("nan"), float("inf")], factor=10.0, spreads=6.0) is None


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"matrix \[clients, d\]"):
        coordinate_median(torch.ones(3))
