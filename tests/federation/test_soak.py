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
    whole = soak(40, 4, rate=0.0, driver=0.0, seed=0, folder=tmp_path / "whole")
    faulty = soak(40, 4, rate=0.08, driver=0.12, seed=1, folder=tmp_path / "faulty")

    assert faulty.digest == whole.digest
    assert set(faulty.faults) == {
        "a client raised",
        "a device was lost",
        "a client hung",
        "the driver stumbled",
        "the disk was full",
    }
    for outcome in (whole, faulty):
        growth = outcome.growth()
        assert growth["files"] <= 0
        assert growth["threads"] <= 0
        assert growth["memory"] < 8  # MiB; 40 rounds of a leaked model or two would be more
