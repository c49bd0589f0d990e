"""Runs one system on one workload in a process of its own and says what it took."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.engine.lines import Line
from benchmarks.engine.tree import Watch

__all__ = ["ROOT", "measure"]

ROOT = Path(__file__).parents[2]
"""Where ``benchmarks`` and ``lightning_pfl`` lie."""

QUIET = {
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}
"""One thread per process, as results must not depend on what else runs; nothing is reported to anybody."""


def measure(
    workload: str,
    system: str,
    command: Sequence[str],
    *,
    repeat: int = 0,
    timeout: float = 1800.0,
) -> Line:
    """Run a system once.

    Args:
        workload: its name.
        system: its name.
        command: a program, which is handed the workload's name and where to write its `Marks` before further arguments:
            ``{}`` in it stands for both.
        repeat: which one this is.
        timeout: seconds; a run that takes longer is killed.

    Returns:
        The line; a run that fails is a line with an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "marks.json"
        filled = [part for one in command for part in ([workload, str(path)] if one == "{}" else [one])]
        with (Path(folder) / "output").open("w+") as output:
            load, spin, before, start = os.getloadavg()[0], _spin(), _waited_for(), time.time()
            process = subprocess.Popen(filled, cwd=ROOT, env={**os.environ, **QUIET}, stdout=output, stderr=output)
            with Watch(process.pid) as watch:
                try:
                    code: int | str = process.wait(timeout)
                except subprocess.TimeoutExpired:
                    process.terminate()
                    process.wait()
                    code = f"{timeout:.0f} s were not enough"
            wall = time.time() - start
            spin = (spin + _spin()) / 2
            # exact for processes that somebody waited for; the readings have the others, too
            cpu = max(_waited_for() - before, watch.cpu)
            output.seek(0)
            said = output.read()
        marks = json.loads(path.read_text()) if path.exists() else None
    if code != 0 or marks is None:
        return Line(workload, system, repeat, error=f"{code}: {said.strip()[-1500:]}")
    return Line(
        workload,
        system,
        repeat,
        cpu_total=round(cpu, 3),
        wall_total=round(wall, 3),
        pss_mib=round(watch.peak_mib, 1),
        processes=watch.processes,
        results=marks["results"],
        machine=_machine(load, spin),
        **_phases(marks, start),
    )


def _phases(marks: Mapping[str, Any], start: float) -> dict[str, float]:
    points, rounds = marks["points"], marks["rounds"]
    phases = {"cpu_imports": points["imported"][1]}
    if "first" in points:
        phases["cpu_start"] = points["first"][1] - points["imported"][1]
        phases["wall_start"] = points["first"][0] - start
    if rounds:
        phases["cpu_round"] = (points["last"][1] - points["first"][1]) / len(rounds)
        phases["wall_round"] = median(rounds)
    return {name: round(value, 4) for name, value in phases.items()}


def _waited_for() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _machine(load: float, spin: float) -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load": round(load, 1),
        "spin": round(spin, 1),
    }


def _spin() -> float:
    """Milliseconds of CPU time of a fixed loop: a crowded machine makes every second of CPU time worth less."""
    start = time.process_time()
    for _ in range(1_000_000):
        pass
    return 1000 * (time.process_time() - start)
