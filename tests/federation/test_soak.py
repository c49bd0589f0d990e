"""The short form of `benchmarks/soak.py`: with random faults, nothing grows and the bytes come out the same."""

import pytest

from benchmarks.soak import quiet, soak


@pytest.fixture(autouse=True)
def levels(caplog):
    """Restored by `caplog`, as quiet changes levels."""
    import logging

    before = {name: logging.getLogger(name).level for name in ("lightning", "lightning.pytorch", "lightning_pfl")}
    quiet()
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def test_random_faults_change_no_bytes_and_leave_nothing_behind(tmp_path):
    whole = soak(20, 4, rate=0.0, driver=0.0, seed=0, folder=tmp_path / "whole")
    faulty = soak(20, 4, rate=0.05, driver=0.1, seed=0, folder=tmp_path / "faulty")
    assert faulty.resumed > 0  # and did not begin anew each time

    assert faulty.digest == whole.digest
    assert len(faulty.faults) >= 3, faulty.faults  # kinds of faults
    for outcome in (whole, faulty):
        growth = outcome.growth()
        assert growth["files"] <= 0
        assert growth["threads"] <= 0
        assert growth["memory"] < 8  # MiB; a long form shows less
