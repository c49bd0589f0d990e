"""Who takes part depends on the run's seed and the round, and on nothing else."""

from collections import Counter

import pytest
import torch

from lightning_pfl.federation.schedule import client_seed, participants

IDS = [f"client-{index}" for index in range(10)]


@pytest.mark.parametrize(("fraction", "count"), [(1.0, 10), (0.3, 3), (0.25, 3), (0.01, 1)])
def test_as_many_as_the_fraction_says_but_at_least_one(fraction, count):
    drawn = participants(IDS, fraction=fraction, seed=0, round=4)

    assert len(set(drawn)) == count
    assert list(drawn) == sorted(drawn)


def test_a_draw_neither_feels_nor_changes_the_global_stream():
    torch.manual_seed(1)
    first = participants(IDS, fraction=0.5, seed=3, round=2)
    after = torch.rand(1)
    torch.manual_seed(1)

    assert torch.equal(torch.rand(1), after)
    assert participants(IDS, fraction=0.5, seed=3, round=2) == first
    assert participants(IDS, fraction=0.5, seed=4, round=2) != first


def test_everybody_comes_up_about_equally_often():
    counts = Counter(name for round in range(300) for name in participants(IDS, fraction=0.3, seed=0, round=round))

    assert set(counts) == set(IDS)
    assert all(60 < count < 120 for count in counts.values())  # 90 expected, standard deviation 8


def test_clients_have_seeds_of_their_own_that_fit_torch():
    seeds = {client_seed(seed, name) for seed in range(20) for name in IDS}

    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_more_are_drawn_by_a_share_and_fewer_by_those_who_are_at_work():
    """Of ten, a fifth is wanted and three times as many may be at work: six, of whom two are."""
    busy = {"client-0", "client-5"}
    drawn = participants(IDS, fraction=0.2, seed=0, round=1, over_select=2.0, busy=busy)

    assert len(set(drawn)) == 4
    assert not busy & set(drawn)
    assert participants(IDS, fraction=0.2, seed=0, round=1, busy=busy) == ()


def test_a_share_of_more_than_there_are_is_everybody():
    assert participants(IDS, fraction=0.5, seed=0, round=1, over_select=3.0) == tuple(IDS)
    assert participants(IDS, fraction=0.5, seed=0, round=1, over_select=3.0, busy=IDS[1:]) == ("client-0",)
