"""Tables of lines: per workload one row per system, medians over its runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median

from benchmarks.engine.lines import Line
from benchmarks.engine.workload import WORKLOADS

__all__ = ["table"]


def table(lines: Iterable[Line]) -> str:
    """All workloads' tables as Markdown, in the order in which workloads and systems first occur.

    Args:
        lines: of any number of runs; those with errors are listed under the table.
    """
    groups: dict[str, dict[str, list[Line]]] = {}
    for line in lines:
        groups.setdefault(line.workload, {}).setdefault(line.system, []).append(line)
    return "\n\n".join(_workload(name, systems) for name, systems in groups.items()) + "\n"


def _workload(name: str, systems: dict[str, list[Line]]) -> str:
    good = {system: [one for one in runs if not one.error] for system, runs in systems.items()}
    good = {system: runs for system, runs in good.items() if runs}
    floor = _middle(good["loop"], lambda one: one.cpu_round) if "loop" in good else None
    turns = WORKLOADS[name].cohort if name in WORKLOADS else None
    keys = list(dict.fromkeys(key for runs in good.values() for one in runs for key in one.results))
    heads = ["system", "runs", "CPU-s", "imports", "round 1", "steady round", "x loop", "ms over it", "s to round 1"]
    heads += ["s a round", "peak MiB", "processes", "spin", *keys]
    rows = [_row(system, runs, keys, floor, turns) for system, runs in good.items()]
    used = [index for index in range(len(heads)) if any(row[index] for row in rows)]
    marked = [[cells[index] for index in used] for cells in [heads, ["---"] * len(heads), *rows]]
    parts = [f"### {name}", "\n".join(f"| {' | '.join(cells)} |" for cells in marked)]
    parts += [
        f"- {system}: no result: {' '.join(one.error.split())[-300:]}"
        for system, runs in systems.items()
        for one in runs
        if one.error
    ]
    return "\n\n".join(parts)


def _row(system: str, runs: Sequence[Line], keys: Sequence[str], floor: float | None, turns: int | None) -> list[str]:
    steady = _middle(runs, lambda one: one.cpu_round)
    over = None if steady is None or floor is None or turns is None else 1000 * (steady - floor) / turns
    return [
        system,
        str(len(runs)),
        _said(_middle(runs, lambda one: one.cpu_total), 1),
        _said(_middle(runs, lambda one: one.cpu_imports), 1),
        _said(_middle(runs, lambda one: one.cpu_start), 1),
        _said(steady, 3),
        _said(steady / floor if steady is not None and floor else None, 2),
        _said(over if system != "loop" else None, 1),
        _said(_middle(runs, lambda one: one.wall_start), 1),
        _said(_middle(runs, lambda one: one.wall_round), 3),
        _said(_middle(runs, lambda one: one.pss_mib), 0),
        _said(_middle(runs, lambda one: one.processes), 0),
        _said(_middle(runs, lambda one: one.machine.get("spin")), 0),
        *(_result(runs, key) for key in keys),
    ]


def _result(runs: Sequence[Line], key: str) -> str:
    values = [one.results[key] for one in runs if key in one.results]
    if values and all(isinstance(value, (int, float)) for value in values):
        return f"{median(values):.4g}"
    return ", ".join(sorted({str(value) for value in values}))


def _middle(runs: Sequence[Line], of: Callable[[Line], float | None]) -> float | None:
    values = [value for value in map(of, runs) if value is not None]
    return median(values) if values else None


def _said(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
