"""Promises of `lightning_pfl.functional.routing`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pfl.functional.routing import Blend, Keys, Nearest, distances


def blob(centre, count, seed=0, width=0.3):
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(centre) + width * torch.randn(count, len(centre), generator=generator)


def test_counts_means_and_squares_of_a_union_are_those_of_all_its_questions():
    """However often groups were put together before: two halves, merged one after the other."""
    questions = blob([3.0, -1.0], 40)
    halves = Keys.of(questions[:17], limit=3) + Keys.of(questions[17:], limit=5)

    merged = halves.merged(1)

    assert merged.counts.item() == 40
    torch.testing.assert_close(merged.means[0], questions.mean(dim=0))
    torch.testing.assert_close(merged.scatters[0], (questions - questions.mean(dim=0)).square().sum(dim=0))


def test_what_costs_least_is_put_together():
    """0 and 1 cost 1/2. Then {0, 1} and 4 cost 2/3 * 3.5^2 = 8.2, though 3.5^2 = 12.3; 4 and 8.5 cost 4.5^2 / 2 = 10.1.

    With 8 in the place of 8.5 those would cost 8, which is less.
    """
    for last, expected in ((8.5, [(5 / 3, 3.0), (8.5, 1.0)]), (8.0, [(0.5, 2.0), (6.0, 2.0)])):
        keys = Keys.of(torch.tensor([[0.0], [last], [4.0], [1.0]]), limit=2)
        found = sorted(zip(keys.means.flatten().tolist(), keys.counts.tolist(), strict=True))
        assert found == [pytest.approx(pair) for pair in expected]


def test_tasks_one_after_another_stay_apart_where_one_mean_would_lie_between_them():
    first, second = blob([0.0, 0.0], 30, 1), blob([10.0, 0.0], 50, 2)

    keys = (Keys.of(first, limit=4) + Keys.of(second, limit=4)).merged(2)

    found = sorted(zip(keys.means[:, 0].round().tolist(), keys.counts.tolist(), strict=True))
    assert found == [(0.0, 30.0), (10.0, 50.0)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_the_order_of_questions_and_of_groups_changes_no_bit(seed, limit):
    generator = torch.Generator().manual_seed(seed)
    questions = torch.randn(12, 3, generator=generator).round(decimals=1)  # rounded, so that costs are often equal
    order = torch.randperm(12, generator=generator)

    keys = Keys.of(questions, limit=8)
    shuffled = Keys(keys.rows[torch.randperm(len(keys.rows), generator=generator)])

    assert torch.equal(Keys.of(questions[order], limit=limit).rows, Keys.of(questions, limit=limit).rows)
    assert torch.equal(shuffled.merged(limit).rows, keys.merged(limit).rows)


def test_what_varies_within_a_kind_of_questions_says_little_of_it():
    """Owners differ in the first coordinate; the second varies a hundred times as much, and misleads plain distance."""
    wide = torch.tensor([[1.0, 0.0], [0.0, 100.0]])
    one, two = blob([0.0, 0.0], 200, 1) @ wide, blob([3.0, 0.0], 200, 2) @ wide
    keys = [Keys.of(one, limit=1), Keys.of(two, limit=1)]
    question = torch.stack([one.mean(dim=0), two.mean(dim=0)]) + torch.tensor([[0.0, 20.0], [0.0, -20.0]])

    assert distances(question, keys).argmin(dim=1).tolist() == [0, 1]
    plain = torch.cdist(question, torch.cat([each.means for each in keys]))
    assert plain.argmin(dim=1).tolist() != [0, 1] or bool((plain[:, 0] / plain[:, 1] > 0.9).any())


def test_an_owner_is_as_near_as_the_nearest_of_its_groups():
    two_tasks = Keys.of(torch.tensor([[0.0], [10.0]]), limit=2)  # single questions: no spread, so plain distance
    between = Keys.of(torch.tensor([[6.0]]), limit=1)

    torch.testing.assert_close(
        distances(torch.tensor([[1.0], [7.0]]), [two_tasks, between]), torch.tensor([[1.0, 25.0], [9.0, 1.0]])
    )


def test_the_own_adapter_answers_unless_another_is_much_nearer():
    far = torch.tensor([[3.0, 2.0, 9.0], [3.1, 2.0, 9.0], [0.0, 0.0, 0.0], [5.0, 9.0, 2.0]])

    assert Nearest().weights(far, own=0).argmax(dim=1).tolist() == [0, 1, 0, 2]
    assert Nearest(margin=1).weights(far, own=0).argmax(dim=1).tolist() == [1, 1, 0, 2]
    assert Nearest(margin=10).weights(far, own=1).argmax(dim=1).tolist() == [1, 1, 1, 1]


def test_all_within_reach_answer_by_their_mean_and_the_own_counts_more():
    """Two in reach: a half each; the own one has a quarter beside three quarters of its half. Not in reach: nothing."""
    far = torch.tensor([[2.0, 1.0, 9.0], [2.1, 1.0, 1.5], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.625, 0.375, 0.0], [0.0, 0.5, 0.5], [0.5, 0.25, 0.25]])
    torch.testing.assert_close(Blend().weights(far, own=0), expected)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(0, 3), "at least one group"),
        (torch.ones(2, 4), r"shape \[m, 1 \+ 2 k\]"),
        (torch.ones(3), r"shape \[m, 1 \+ 2 k\]"),
        (torch.ones(1, 3).double(), "float32"),
        (torch.tensor([[1.0, float("nan"), 0.0]]), "finite"),
        (torch.tensor([[0.0, 1.0, 0.0]]), "at least one question"),
        (torch.tensor([[1.0, 1.0, -1.0]]), "not negative"),
    ],
)
def test_rows_that_are_no_keys_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        Keys(rows)


def test_questions_and_keys_of_other_readers_do_not_meet():
    keys = Keys.of(torch.zeros(1, 2), limit=1)
    with pytest.raises(ValueError, match="one number of coordinates"):
        distances(torch.zeros(1, 3), [keys])
    with pytest.raises(ValueError, match="there must be an owner"):
        distances(torch.zeros(1, 3), [])
    with pytest.raises(ValueError, match="`margin`"):
        Nearest(margin=0.5)
    with pytest.raises(ValueError, match="`reach`"):
        Blend(reach=0.5)
    with pytest.raises(ValueError, match="`own`"):
        Blend(own=1.5)
    with pytest.raises(ValueError, match="`limit`"):
        keys.merged(0)
