"""Promises of `lightning_pfl.metrics.scores`."""

import pickle

import pytest
import torch

from lightning_pfl.metrics.scores import (
    PersonalizationScores,
    area_under_rounds,
    forgetting,
    forward_transfer,
    worst_decile,
)

NAN = float("nan")
TASKS = {"a": ["cats", "dogs"], "b": ["flags"], "c": ["food", "cats"]}
FAMILIES = {"cats": "animals", "dogs": "animals", "flags": "signs", "food": "food"}


def metric(**settings):
    return PersonalizationScores(TASKS, **settings)


def test_self_and_others_by_hand():
    """Columns cats, dogs, flags, food. Self: .7, .9, .5; Others: a .25, b .3, c .2 (cats is c's own too)."""
    scores = metric()
    scores.update(torch.tensor([[0.8, 0.6, 0.2, 0.3], [0.1, 0.2, 0.9, 0.6], [0.4, 0.1, 0.3, 0.6]]), round=0)
    result = scores.compute()

    assert scores.task_ids == ("cats", "dogs", "flags", "food")
    torch.testing.assert_close(result["self_last"], torch.tensor((0.7 + 0.9 + 0.5) / 3))
    torch.testing.assert_close(result["others_last"], torch.tensor((0.25 + 0.3 + 0.2) / 3))
    torch.testing.assert_close(result["self_worst_decile"], torch.tensor(0.5))


def test_others_are_split_by_whether_the_family_is_known():
    """a's others: flags, food unseen; b's: all unseen; c's: dogs seen (it has cats), flags unseen."""
    scores = metric(families=FAMILIES)
    scores.update(torch.tensor([[0.8, 0.6, 0.2, 0.4], [0.1, 0.2, 0.9, 0.6], [0.4, 0.7, 0.5, 0.6]]), round=0)
    result = scores.compute()

    torch.testing.assert_close(result["others_seen_last"], torch.tensor(0.7))
    torch.testing.assert_close(result["others_unseen_last"], torch.tensor((0.3 + 0.3 + 0.5) / 3))


def test_rounds_may_come_in_any_order():
    """Last is the highest round, not the latest call."""
    tables = torch.rand(4, 3, 4, generator=torch.Generator().manual_seed(0))
    forwards, mixed = metric(), metric()
    for round in (0, 1, 2, 3):
        forwards.update(tables[round], round=round)
    for round in (3, 0, 2, 1):
        mixed.update(tables[round], round=round)

    for name, value in forwards.compute().items():
        torch.testing.assert_close(mixed.compute()[name], value)


def test_tasks_that_were_not_evaluated_are_left_out():
    """Dogs was not evaluated for a: its Self is cats alone; nobody's Others exist but a's flags."""
    scores = metric()
    table = torch.full((3, 4), NAN)
    table[0, 0], table[0, 2], table[1, 2] = 0.8, 0.3, 0.6
    scores.update(table, round=0)
    result = scores.compute()

    torch.testing.assert_close(result["self_last"], torch.tensor(0.7))
    torch.testing.assert_close(result["others_last"], torch.tensor(0.3))
    torch.testing.assert_close(result["self_std"], torch.tensor(0.1))


def test_the_area_counts_rounds_not_evaluations():
    """.0 at round 0, .4 at 2, .6 at 3: (2 * .2 + 1 * .5) / 3 = .3, where the plain mean says .333."""
    torch.testing.assert_close(
        area_under_rounds(torch.tensor([0.0, 0.4, 0.6]), torch.tensor([0, 2, 3])), torch.tensor(0.3)
    )
    assert area_under_rounds(torch.tensor([0.4]), torch.tensor([7])) == 0.4


def test_forgetting_is_the_fall_from_the_best_earlier_round():
    """Task 0: best .9, last .7, fell .2; task 1 rises to its best, -.1; not owned: task 2. Mean .05."""
    tables = torch.tensor([[[0.5, 0.3, 1.0]], [[0.9, 0.2, 1.0]], [[0.7, 0.4, 0.0]]])
    owned = torch.tensor([[True, True, False]])

    torch.testing.assert_close(forgetting(tables, owned), torch.tensor([0.05]))
    assert forgetting(tables[:1], owned).isnan().all()


def test_forgetting_ignores_rounds_in_which_a_task_was_not_evaluated():
    """A task first seen in the last round has nothing to forget; one with a gap keeps its best."""
    tables = torch.tensor([[[0.8, NAN]], [[NAN, NAN]], [[0.5, 0.9]]])

    torch.testing.assert_close(forgetting(tables, torch.tensor([[True, True]])), torch.tensor([0.3]))


def test_the_worst_decile_of_eleven_clients_is_two_of_them():
    """Rounded up; clients without a value do not count."""
    values = torch.tensor([0.9] * 9 + [0.1, 0.3, NAN])

    torch.testing.assert_close(worst_decile(values), torch.tensor(0.2))


def test_reset_and_pickle_do_what_torchmetrics_promises():
    """It may live in a module that is checkpointed."""
    scores = metric(families=FAMILIES)
    scores.update(torch.rand(3, 4), round=0)
    copy = pickle.loads(pickle.dumps(scores))
    torch.testing.assert_close(copy.compute()["self_last"], scores.compute()["self_last"])

    scores.reset()
    scores.update(torch.full((3, 4), 0.25), round=0)
    assert scores.compute()["self_last"] == 0.25


def test_bad_tables_and_rounds_are_refused():
    """A transposed table, a round twice, nothing at all."""
    scores = metric()
    with pytest.raises(ValueError, match="no round"):
        scores.compute()
    with pytest.raises(ValueError, match=r"3 clients by 4 tasks.*\(4, 3\)"):
        scores.update(torch.zeros(4, 3), round=0)
    scores.update(torch.zeros(3, 4), round=2)
    with pytest.raises(ValueError, match="Round 2"):
        scores.update(torch.zeros(3, 4), round=2)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"tasks": {"a": []}}, "`a`"),
        ({"tasks": {"a": "cats"}}, "`a`"),
        ({"tasks": {"a": ["cats"]}, "all_tasks": ["dogs"]}, "cats"),
        ({"tasks": {"a": ["cats"]}, "families": {"dogs": "animals"}}, "cats"),
    ],
)
def test_tasks_that_do_not_fit_together_are_refused_by_name(settings, word):
    """No task, a text for a list, a task outside the table, a task without a family."""
    with pytest.raises(ValueError, match=word):
        PersonalizationScores(**settings)


def test_forward_transfer_by_hand():
    """Dogs begin in round 2, seen last in round 1: .45 - .25; cats begin at once; b has no later task."""
    tables = torch.tensor([[[0.5, 0.40], [0.3, 0.5]], [[0.6, 0.45], [0.3, 0.5]], [[0.6, 0.80], [0.3, 0.5]]])
    starts = torch.tensor([[0, 2], [-1, 0]])
    baseline = torch.tensor([[0.2, 0.25], [0.2, 0.25]])

    found = forward_transfer(tables, torch.tensor([0, 1, 2]), starts, baseline)

    torch.testing.assert_close(found, torch.tensor([0.2, NAN]), equal_nan=True)


def test_forward_transfer_takes_the_last_evaluated_round_before_a_task_begins():
    """Rounds 0 and 3 were evaluated, the task begins in 4; NaN in 3 leaves the value of 0."""
    tables = torch.tensor([[[0.3]], [[0.5]]])
    starts, baseline = torch.tensor([[4]]), torch.tensor([[0.1]])

    torch.testing.assert_close(forward_transfer(tables, torch.tensor([0, 3]), starts, baseline), torch.tensor([0.4]))
    tables[1] = NAN
    torch.testing.assert_close(forward_transfer(tables, torch.tensor([0, 3]), starts, baseline), torch.tensor([0.2]))


def test_every_client_has_scores_of_its_own():
    """a: Self .5 then .7 (area .6), Others .1 then .3 (area .2); b was not evaluated in round 0."""
    scores = PersonalizationScores({"a": ["cats"], "b": ["dogs"]}, families={"cats": "x", "dogs": "y"})
    scores.update(torch.tensor([[0.5, 0.1], [NAN, NAN]]), round=0)
    scores.update(torch.tensor([[0.7, 0.3], [0.2, 0.8]]), round=4)
    found = scores.per_client()

    torch.testing.assert_close(found["self_auc"], torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(found["others_unseen_auc"], torch.tensor([0.2, 0.2]))
    torch.testing.assert_close(found["others_last"], torch.tensor([0.3, 0.2]))
    assert found["others_seen_auc"].isnan().all()
    torch.testing.assert_close(scores.compute()["self_auc"], torch.tensor(0.7))


def test_starts_give_forward_transfer_and_need_a_baseline():
    """a knows dogs a little before it begins them in round 1: .35 - .25."""
    tasks, starts = {"a": ["cats", "dogs"], "b": ["cats"]}, {"a": {"cats": 0, "dogs": 1}, "b": {"cats": 0}}
    scores = PersonalizationScores(tasks, starts=starts, baseline=torch.full((2, 2), 0.25))
    scores.update(torch.tensor([[0.5, 0.35], [0.6, 0.1]]), round=0)

    torch.testing.assert_close(scores.compute()["forward_transfer"], torch.tensor(0.1))
    with pytest.raises(ValueError, match=r"\(2, 2\) scores before any training, but it is None"):
        PersonalizationScores(tasks, starts=starts)
    with pytest.raises(ValueError, match="when client `b` begins `cats`"):
        PersonalizationScores(tasks, starts={"a": starts["a"]}, baseline=torch.zeros(2, 2))
