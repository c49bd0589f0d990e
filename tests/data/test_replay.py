"""What a memory draws, by hand where chance leaves no room and by frequency where it does."""

import math

import pytest
import torch

from lightning_pfl.data import CountReplay, Memory, NewRowsOnly


def draw(replay, memory, rows, **settings):
    settings = {"num_steps": 4, "batch_size": 2, "seed": 0, **settings}
    return replay.draw(memory, torch.tensor(rows), **settings)


def test_a_row_cannot_come_before_it_is_known():
    """Eight rows, four batches: after every second row one batch, of rows known by then."""
    rows, memory = draw(CountReplay(), Memory.empty(), range(8))

    assert len(rows) == 8
    for batch in range(4):
        assert set(rows[2 * batch : 2 * batch + 2].tolist()) <= set(range(2 * batch + 2))
    assert memory.rows.tolist() == list(range(8))


def test_rows_take_turns_when_the_temperature_is_low():
    """Four rows in memory before, two batches of two: all four come once, whatever the seed."""
    replay = CountReplay(temperature=1e-6, decay=1.0)
    known = Memory(torch.arange(3), torch.zeros(3, dtype=torch.float64))
    for seed in range(20):
        rows, memory = draw(replay, known, [3], num_steps=2, seed=seed)
        assert sorted(rows.tolist()) == [0, 1, 2, 3]
        assert memory.counts.tolist() == [1.0] * 4


def test_counts_decay_with_every_batch():
    """Count 2 of the absent row decays twice by .5; the other is drawn twice: (0 + 1) / 2 + 1."""
    replay = CountReplay(temperature=1e-6, decay=0.5)
    known = Memory(torch.tensor([9]), torch.tensor([100.0], dtype=torch.float64))
    _, memory = draw(replay, known, [5], num_steps=2, batch_size=1)

    assert memory.rows.tolist() == [9, 5]
    assert memory.counts.tolist() == [25.0, 1.5]


def test_rows_are_drawn_with_the_stated_probabilities():
    """Counts 0 and ln 3 / 8 after decay 1 at temperature 1/8: probabilities 3/4 and 1/4."""
    replay = CountReplay(decay=1.0)
    known = Memory(torch.tensor([7]), torch.tensor([math.log(3) / 8], dtype=torch.float64))
    first = [int(draw(replay, known, [1], num_steps=1, batch_size=1, seed=seed)[0]) for seed in range(2000)]

    share = first.count(1) / 2000
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 2000)


def test_a_batch_repeats_a_memory_that_is_too_small_for_it():
    rows, memory = draw(CountReplay(), Memory.empty(), [4], num_steps=1, batch_size=3)

    assert rows.tolist() == [4, 4, 4]
    assert memory.counts.tolist() == [1.0]


def test_a_full_memory_makes_room_at_random():
    replay = CountReplay(capacity=3)
    kept = set()
    for seed in range(30):
        _, memory = draw(replay, Memory(torch.arange(3), torch.ones(3, dtype=torch.float64)), [8], seed=seed)
        assert len(memory.rows) == 3
        assert 8 in memory.rows.tolist()
        kept.add(tuple(sorted(memory.rows.tolist())))
    assert kept == {(0, 1, 8), (0, 2, 8), (1, 2, 8)}


def test_more_steps_than_rows_and_more_rows_than_steps_give_the_steps():
    for count, steps in ((3, 10), (100, 7), (5, 5)):
        rows, _ = draw(CountReplay(), Memory.empty(), range(count), num_steps=steps, batch_size=4)
        assert len(rows) == 4 * steps


def test_drawing_leaves_the_memory_alone_and_is_decided_by_the_seed():
    known = Memory(torch.arange(20), torch.zeros(20, dtype=torch.float64))
    one, _ = draw(CountReplay(), known, [20, 21], seed=3)
    again, _ = draw(CountReplay(), known, [20, 21], seed=3)
    other, _ = draw(CountReplay(), known, [20, 21], seed=4)

    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert known.counts.sum() == 0
    assert len(known.rows) == 20


def test_new_rows_only_go_round_whole_and_remember_nothing():
    known = Memory(torch.tensor([99]), torch.ones(1, dtype=torch.float64))
    rows, memory = draw(NewRowsOnly(), known, range(5), num_steps=5)

    assert sorted(rows[:5].tolist()) == sorted(rows[5:].tolist()) == [0, 1, 2, 3, 4]
    assert rows[:5].tolist() != rows[5:].tolist()
    assert memory is known


def test_numbers_out_of_range_and_rounds_of_nothing_are_refused():
    with pytest.raises(ValueError, match="`capacity`"):
        CountReplay(capacity=0)
    with pytest.raises(ValueError, match="`temperature`"):
        CountReplay(temperature=0)
    with pytest.raises(ValueError, match="`decay`"):
        CountReplay(decay=1.5)
    for replay in (CountReplay(), NewRowsOnly()):
        with pytest.raises(ValueError, match="sit it out"):
            replay.draw(Memory.empty(), torch.zeros(0, dtype=torch.long), num_steps=1, batch_size=1, seed=0)
