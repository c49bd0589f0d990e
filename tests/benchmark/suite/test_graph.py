"""The task graph: symmetric, with reasons, and sparse enough that uniform mixing does not find the relatives."""

import pytest

from lightning_pfl.benchmark.suite.catalogue import TASKS, UNSEEN
from lightning_pfl.benchmark.suite.graph import LINKS, relatedness, relatives

IDS = [spec.id for spec in (*TASKS, *UNSEEN)]


def test_links_are_between_tasks_of_the_suite_once_each_and_have_reasons():
    assert all(set(link.tasks) <= set(IDS) and link.reason for link in LINKS)
    assert len({frozenset(link.tasks) for link in LINKS}) == len(LINKS)
    assert all(len(set(link.tasks)) == 2 for link in LINKS)


def test_relatedness_is_symmetric_and_tells_strong_from_weak():
    matrix = relatedness(["A3", "A6", "B1", "K14", "B7"])

    assert matrix == [list(column) for column in zip(*matrix, strict=True)]
    assert matrix[0][1] == 1.0
    assert matrix[2][3] == 0.3
    assert matrix[4] == [0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match=r"must be ids of the suite.*\['Z1'\]"):
        relatedness(["A1", "Z1"])


def test_relatives_come_from_both_ends_of_a_link():
    assert relatives("A6") == ("A3",)
    assert relatives("A3") == ("A6",)
    assert set(relatives("K14", strong=False)) == {"K3", "B1", "K8", "K9"}


@pytest.mark.parametrize("time", range(4))
def test_at_no_time_do_strong_relatives_hold_more_than_a_fifth_of_a_uniform_row(time):
    now = [spec for spec in TASKS if spec.time == time]
    for spec in now:
        others = [other for other in now if other.client != spec.client]
        related = [other for other in others if other.id in relatives(spec.id)]
        assert len(related) / len(others) <= 0.2 or len(related) <= 2
    shares = [sum(o.id in relatives(s.id) for o in now) / 9 for s in now]
    assert sum(shares) / len(shares) <= 0.2


def test_strong_relatives_come_at_the_same_time_twice_only():
    """The guide says so; tasks stand in the places of the published ones."""
    place = {spec.id: (spec.time, spec.client) for spec in TASKS}
    pairs = [link.tasks for link in LINKS if link.strong and set(link.tasks) <= set(place)]

    together = [(one, two) for one, two in pairs if place[one][0] == place[two][0]]

    assert set(together) == {("B1", "K9"), ("B6", "B10")}
