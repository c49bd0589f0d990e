"""A driver that dies leaves no actor behind, another one goes on at once, and the bytes are those of one process."""

import pytest

from tests.federation.test_killed import check, runs

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Undisturbed, in one process."""
    return runs(tmp_path_factory.mktemp("whole"), 0)[0]


def test_a_driver_killed_in_a_turn_or_while_it_writes_ends_with_the_same_bytes_and_frees_the_cluster(tmp_path, whole):
    """The cluster has room for one actor, so the second driver waits for ever if that of the first lives on."""
    instants = ["turn", whole["count"] * 3 // 5]
    for run in runs(tmp_path, *instants, places="cluster"):
        check(run, whole)
        assert run["status"] < 0
        assert run["actors"] == 1
        assert run["orphans"] == []


def test_a_ray_that_a_killed_driver_had_started_ends_with_it(tmp_path, whole):
    (run,) = runs(tmp_path, "turn", places="ray")
    check(run, whole)
    assert run["actors"] == 1
    assert run["orphans"] == []
