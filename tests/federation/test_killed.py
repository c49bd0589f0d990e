"""A driver that dies at any instant, while a checkpoint is written too, loses no whole round."""

import json
import os
import subprocess
import sys

import pytest


def runs(folder, *instants, places="local"):
    done = subprocess.run(
        [sys.executable, "-m", "tests.federation.killed", "--places", places, str(folder), *map(str, instants)],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"instant"')]
    assert len(lines) == len(instants), done.stdout + done.stderr
    return lines


@pytest.mark.timeout(900)  # 20 runs; half a minute on a quiet machine
def test_a_driver_killed_at_any_file_operation_or_time_ends_with_the_same_bytes(tmp_path):
    (whole,) = runs(tmp_path / "whole", 0)
    assert whole["begun"] == [0]
    assert whole["saved"] == 3
    # every 13th operation, which hits opening, syncing (half written), renaming and removing, and a point in time
    instants = [*range(5, whole["count"], 13), -300, "turn"]
    assert len(instants) > 7

    for run in runs(tmp_path / "parts", *instants):
        check(run, whole)


def check(run, whole):
    """What must hold of a run that was killed and resumed."""
    assert run["status"] < 0 or str(run["instant"]).startswith("-")  # a time may be after the end
    assert run["resumed"] == 0, run
    assert run["outcome"] == whole["outcome"], run
    assert set(whole["left"]) <= set(run["left"]), run  # one that was just written may be left over
    if run["status"] < 0 and len(run["begun"]) > 1:
        assert run["begun"][1] >= run["saved"], run  # it went on from the last whole checkpoint, or a later one
