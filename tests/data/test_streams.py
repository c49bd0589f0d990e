"""Every row comes exactly once, in the round where it belongs."""

from fractions import Fraction

import pytest
import torch

from lightning_pfl.data import DynamicStream, StaticStream, drifting_order


def all_rows(stream):
    return torch.cat([stream.new_rows(round) for round in range(stream.num_rounds)])


@pytest.mark.parametrize("rounds_per_task", [1, 2, 5, 2.5, 0.7, Fraction(1, 3), 1.1, 7])
@pytest.mark.parametrize("sizes", [(10, 7, 3, 11), (1, 1), (5,), (4, 0, 6)])
def test_every_row_comes_once_and_tasks_come_in_order(sizes, rounds_per_task):
    stream = DynamicStream(sizes, rounds_per_task, seed=3)
    rows = all_rows(stream)

    assert sorted(rows.tolist()) == list(range(sum(sizes)))
    bounds = torch.tensor(sizes).cumsum(0)
    tasks = torch.bucketize(rows, bounds, right=True)
    assert torch.equal(tasks, tasks.sort().values)


def test_two_and_a_half_rounds_per_task_by_hand():
    """Cuts at 0, .4, .8 of the first task; the third round takes its last fifth and the second's first fifth."""
    stream = DynamicStream([10, 20], 2.5)

    assert stream.num_rounds == 5
    assert [len(stream.new_rows(round)) for round in range(5)] == [4, 4, 2 + 4, 8, 8]
    assert [stream.tasks_in(round) for round in range(5)] == [(0,), (0,), (0, 1), (1,), (1,)]
    assert stream.starts == (0, 2)


def test_a_third_is_a_third():
    """0.1 + 0.2 of floating point would shift a row; 100 rounds of a tenth of a round per task must not."""
    stream = DynamicStream([30] * 10, Fraction(1, 10))
    assert [len(stream.new_rows(round)) for round in range(stream.num_rounds)] == [300]
    tenths = DynamicStream([3] * 3, 1.1)
    # 1.1 is eleven tenths: the second round begins at row int(3 * 10 / 11) = 2 of the first task
    assert len(tenths.new_rows(0)) == 2
    assert tenths.tasks_in(1) == (0, 1)


def test_an_idle_slot_brings_nothing_and_is_counted():
    stream = DynamicStream([4, 0, 4], 2)

    assert stream.idle_rounds == (2, 3)
    assert stream.starts == (0, None, 4)
    assert stream.tasks_in(2) == ()


def test_the_seed_decides_and_asking_again_changes_nothing():
    one, other = (DynamicStream([50, 50], 5, seed=seed) for seed in (1, 2))

    assert not torch.equal(one.new_rows(3), other.new_rows(3))
    one.new_rows(3).zero_()
    assert torch.equal(one.new_rows(3), DynamicStream([50, 50], 5, seed=1).new_rows(3))


def test_static_rounds_mix_the_tasks_evenly():
    stream = StaticStream([60, 60, 60], 7, seed=0)

    assert sorted(all_rows(stream).tolist()) == list(range(180))
    assert {len(stream.new_rows(round)) for round in range(7)} == {25, 26}
    assert all(stream.tasks_in(round) == (0, 1, 2) for round in range(7))
    assert not torch.equal(stream.new_rows(0), StaticStream([60, 60, 60], 7, seed=1).new_rows(0))
    stream.new_rows(0).zero_()
    assert torch.equal(stream.new_rows(0), StaticStream([60, 60, 60], 7, seed=0).new_rows(0))


def test_a_given_order_is_kept_and_moves_no_other_task():
    plain = DynamicStream([4, 6], 1, seed=5)
    ordered = DynamicStream([4, 6], 1, orders=[torch.tensor([2, 0, 3, 1]), None], seed=5)

    assert ordered.new_rows(0).tolist() == [2, 0, 3, 1]
    assert torch.equal(ordered.new_rows(1), plain.new_rows(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DynamicStream([], 1), "at least one task"),
        (lambda: DynamicStream([3, -1], 1), "at least one task"),
        (lambda: DynamicStream([3], 0), "`rounds_per_task` must be above 0"),
        (lambda: DynamicStream([3], 1, orders=[torch.tensor([0, 1, 1])]), r"`orders\[0\]` must hold each of .* 3 rows"),
        (lambda: DynamicStream([3], 1, orders=[]), "one order .* per task, 1, not 0"),
        (lambda: StaticStream([3], 0), "`num_rounds` must be at least 1"),
        (lambda: DynamicStream([3], 2).new_rows(2), "rounds 0 to 1, but was asked for 2"),
        (lambda: StaticStream([3], 2).new_rows(-1), "rounds 0 to 1, but was asked for -1"),
    ],
)
def test_what_makes_no_stream_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_phases_of_a_covariate_follow_one_another():
    """Width 1: all of one artist, then all of the next; inside a phase the order is drawn."""
    artists = ["c", "a", "b"] * 40
    order = drifting_order(artists, order=["a", "b", "c"], seed=1)

    assert sorted(order.tolist()) == list(range(120))
    assert [artists[row] for row in order] == ["a"] * 40 + ["b"] * 40 + ["c"] * 40
    assert order[:40].tolist() != sorted(order[:40].tolist())
    assert not torch.equal(order, drifting_order(artists, order=["a", "b", "c"], seed=2))


def test_a_wider_drift_lets_phases_overlap_into_neighbours_only():
    """Width 2 reaches half into each neighbour: the first and the last artist of three never meet."""
    artists = ["a", "b", "c"] * 300
    shown = [artists[row] for row in drifting_order(artists, width=2.0, seed=0)]

    assert shown[:450].count("b") > 0 < shown[:300].count("b")
    assert max(i for i, one in enumerate(shown) if one == "a") < min(i for i, one in enumerate(shown) if one == "c")
    mixed = [artists[row] for row in drifting_order(artists, width=100.0, seed=0)]
    assert abs(mixed[:300].count("a") - 100) < 30


def test_a_drift_that_lacks_a_value_is_refused():
    with pytest.raises(ValueError, match=r"lacks \['c'\]"):
        drifting_order(["a", "c"], order=["a"])
    with pytest.raises(ValueError, match="name every value once"):
        drifting_order(["a"], order=["a", "a"])
    with pytest.raises(ValueError, match="must not be negative"):
        drifting_order(["a"], width=-1)


def test_a_drifting_stream_moves_from_artist_to_artist():
    artists = ["google", "twitter"] * 10
    stream = DynamicStream([20], 4, orders=[drifting_order(artists, order=["twitter", "google"])])

    shown = [{artists[row] for row in stream.new_rows(round)} for round in range(4)]
    assert shown == [{"twitter"}, {"twitter"}, {"google"}, {"google"}]
