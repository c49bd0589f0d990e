"""Write what was measured of the suite's tasks into the docs: `python benchmarks/suite_table.py`.

Reads `benchmarks/suite_probe.jsonl` (from suite_headroom.py) and `benchmarks/suite_central.jsonl` (from
suite_central.py) and fills the part between two marks of docs/guides/suite.md. What was not measured is a dash.

All draws of a task ask the same test questions, so errors are those of one draw: of a share p of m questions,
sqrt(p (1 - p) / m); of a gain, from the questions that changed sides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean

from lightning_pfl.benchmark.suite.catalogue import TASKS, UNSEEN
from lightning_pfl.benchmark.suite.graph import LINKS, relatives
from lightning_pfl.benchmark.suite.recipes import SUITE, TaskSpec

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "guides" / "suite.md"
PROBE, CENTRAL = (16, 64, 320), (16, 64, 320)
MODELS = {"smollm2": "SmolLM2", "gemma3": "Gemma 3"}
SPECS = (*TASKS, *UNSEEN)
Rows = Sequence[dict]


def read(name: str) -> list[dict]:
    path = HERE / name
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["suite"] == SUITE]


def percent(value: float) -> str:
    return f"{100 * value:.0f}"


def gain(rows: Rows) -> tuple[float, float]:
    """Points that relatives' data add, and their standard error."""
    count, won, lost = (mean(row[name] for row in rows) for name in ("examples", "won", "lost"))
    return 100 * (won - lost) / count, 100 * max(won + lost - (won - lost) ** 2 / count, 0) ** 0.5 / count


def cell(rows: Rows) -> str:
    """Accuracy of own data -> with relatives' data, or one number where there is no relative."""
    if not rows:
        return "-"
    alone, pooled = (mean(row[name] for row in rows) for name in ("test", "pooled_test"))
    if not rows[0]["relatives"]:
        return percent(alone)
    return f"{percent(alone)} → {percent(pooled)} ({gain(rows)[0]:+.0f})"


def helpers(rows: Rows, task: str) -> str:
    """Ids of the relatives whose data were used; in brackets where the link is weak."""
    names = dict.fromkeys(name for row in rows for name in row["relatives"])
    return " ".join(name if name in relatives(task) else f"({name})" for name in names)


def line(spec: TaskSpec, probed: Rows, trained: Rows) -> str:
    mine, central = ([row for row in rows if row["task"] == spec.id] for rows in (probed, trained))
    cells = [spec.name, percent(mine[0]["chance"]) if mine else "-"]
    cells += [cell([row for row in mine if row["n"] == n]) for n in PROBE]
    for model in MODELS:
        cells += [cell([row for row in central if row["model"] == model and row["n"] == n]) for n in CENTRAL]
    return "| " + " | ".join([*cells, helpers(mine, spec.id)]) + " |"


def families() -> list[tuple[str, tuple[str, ...]]]:
    """Trained tasks that strong links hold together, with what they share."""
    trained = {spec.id for spec in TASKS}
    found: list[set[str]] = []
    for link in LINKS:
        if link.strong and trained >= set(link.tasks):
            touched = [family for family in found if family & set(link.tasks)]
            found = [family for family in found if family not in touched] + [set(link.tasks).union(*touched)]
    order = [spec.id for spec in TASKS]
    named = []
    for family in found:
        reasons = dict.fromkeys(link.reason for link in LINKS if link.strong and set(link.tasks) <= family)
        named.append(("; ".join(reasons), tuple(sorted(family, key=order.index))))
    return sorted(named, key=lambda one: order.index(one[1][0]))


def together(rows: Rows, tasks: Iterable[str]) -> tuple[float, float] | None:
    """Mean gain of tasks and its standard error; None unless all were measured."""
    of_task = [[row for row in rows if row["task"] == task] for task in tasks]
    if not of_task or not all(of_task):
        return None
    gains = [gain(rows) for rows in of_task]
    return mean(value for value, _ in gains), sum(error**2 for _, error in gains) ** 0.5 / len(gains)


def columns(probed: Rows, trained: Rows) -> list[Rows]:
    """Rows of the probe by n, then of training by n, models together."""
    return [
        [row for row in rows if row["n"] == n] for rows, sizes in ((probed, PROBE), (trained, CENTRAL)) for n in sizes
    ]


def said(found: tuple[float, float] | None) -> str:
    return "-" if found is None else f"{found[0]:+.1f} ± {1.96 * found[1]:.1f}"


def table(heads: Sequence[str], lines: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|", *lines]


def family_table(probed: Rows, trained: Rows) -> list[str]:
    heads = ["what is shared", "tasks", *(f"probe, n = {n}" for n in PROBE), *(f"trained, n = {n}" for n in CENTRAL)]
    lines = []
    kinds = [*families(), ("all of these", tuple(name for _, names in families() for name in names))]
    for reason, tasks in kinds:
        cells = [said(together(rows, tasks)) for rows in columns(probed, trained)]
        names = f"{len(tasks)} tasks" if reason == "all of these" else " ".join(tasks)
        lines.append("| " + " | ".join([reason, names, *cells]) + " |")
    return table(heads, lines)


def low(rows: Rows, which: Callable[[dict], float]) -> tuple[float, float]:
    """Accuracy, and the lower end of its 95 % interval."""
    share, count = mean(map(which, rows)), rows[0]["examples"]
    return share, share - 1.96 * (max(share * (1 - share), 0.01) / count) ** 0.5


def at_chance(rows: Rows, tasks: Iterable[str]) -> str:
    """Tasks whose interval reaches down to chance, whether alone or with relatives."""
    found = []
    for task in tasks:
        mine = [row for row in rows if row["task"] == task]
        if not mine:
            continue
        share, end = max(low(mine, lambda row: row["test"]), low(mine, lambda row: row["pooled_test"]))
        if end <= mine[0]["chance"]:
            found.append(f"{task} ({percent(share)} ± {percent(share - end)}, chance {percent(mine[0]['chance'])})")
    measured = {row["task"] for row in rows}
    return f"{len(found)} of {len(measured)}" + (f": {', '.join(found)}" if found else "")


def shares(*, so_far: bool) -> str:
    """At each time: the mean share of a uniform row of the other clients that strong relatives of the task of now hold.

    Of the others, the tasks of now count, or all that they have had so far.
    """
    at = {(spec.client, spec.time): spec.id for spec in TASKS}
    clients = {client for client, _ in at}
    found = []
    for now in range(4):
        times = range(now + 1) if so_far else (now,)
        held = [
            any(at[other, time] in relatives(at[client, now]) for time in times)
            for client in clients
            for other in clients - {client}
        ]
        found.append(f"{mean(held):.2f}")
    return ", ".join(found)


def short_of(probed: Rows, trained: Rows, points: float = 5.0) -> list[str]:
    """Families whose mean gain is below so many points, by column."""
    titles = [f"the probe at n = {n}" for n in PROBE] + [f"training at n = {n}" for n in CENTRAL]
    said_of = []
    for title, rows in zip(titles, columns(probed, trained), strict=True):
        gains = {" ".join(tasks): together(rows, tasks) for _, tasks in families()}
        measured = {name: found for name, found in gains.items() if found is not None}
        if measured:
            below = [name for name, found in measured.items() if found[0] < points]
            said_of.append(f"- {title}: {len(below)} of {len(measured)}" + (f" ({'; '.join(below)})" if below else ""))
    return said_of


def main() -> None:
    probed, trained = read("suite_probe.jsonl"), read("suite_central.jsonl")
    heads = ["task", "chance", *(f"probe, n = {n}" for n in PROBE)]
    heads += [f"{title}, n = {n}" for title in MODELS.values() for n in CENTRAL] + ["relatives"]
    ids = [spec.id for spec in SPECS]
    parts = [(f"the probe at n = {n}", [row for row in probed if row["n"] == n]) for n in PROBE]
    parts += [
        (f"{title}, trained on n = {n}", [row for row in trained if row["model"] == model and row["n"] == n])
        for model, title in MODELS.items()
        for n in CENTRAL
    ]
    text = [
        "Points that relatives' data add, per family, with 95 % intervals:",
        "",
        *family_table(probed, trained),
        "",
        "Families with less than 5 points of headroom:",
        "",
        *(short_of(probed, trained) or ["- not measured"]),
        "",
        "Tasks on which the 95 % interval of the accuracy, alone or with relatives, reaches down to chance:",
        "",
        *(f"- {title}: {at_chance(rows, ids)}" for title, rows in parts),
        "",
        f"Strong relatives of a client's task hold {shares(so_far=False)} of a uniform row of the other clients at the "
        f"four times in turn, and {shares(so_far=True)} if all tasks count that the others have had so far.",
        "",
        *table(heads, [line(spec, probed, trained) for spec in SPECS]),
        "",
        f"Measured: the probe on {len({row['task'] for row in probed})} of {len(SPECS)} tasks, centralised training on "
        f"{len({row['task'] for row in trained})}.",
    ]  # fmt: skip
    page = PAGE.read_text(encoding="utf8")
    page = re.sub(
        r"(<!-- headroom -->\n).*?(<!-- end headroom -->)",
        lambda mark: mark[1] + "\n".join(text) + "\n" + mark[2],
        page,
        flags=re.S,
    )
    PAGE.write_text(page, encoding="utf8")


if __name__ == "__main__":
    main()
