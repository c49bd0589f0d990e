"""Write what was measured of the suite's tasks into the docs: `python benchmarks/suite_table.py`.

Reads `benchmarks/suite_probe.jsonl` (from suite_headroom.py) and `benchmarks/suite_central.jsonl` (from
suite_central.py) and fills the part between two marks of docs/guides/suite.md. What was not measured is a dash.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from lightning_pfl.benchmark.suite.catalogue import find_tasks
from lightning_pfl.benchmark.suite.recipes import SUITE, TaskSpec

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "guides" / "suite.md"
SIZES = (16, 64, 320)
MODELS = ("smollm2", "gemma3")


def read(name: str) -> list[dict]:
    path = HERE / name
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["suite"] == SUITE]


def percent(value: float) -> str:
    return f"{100 * value:.0f}"


def arrow(rows: Sequence[dict]) -> str:
    """Own data alone -> with relatives; one number where there is no relative."""
    if not rows:
        return "-"
    alone, pooled = (mean(row[name] for row in rows) for name in ("test", "pooled_test"))
    return f"{percent(alone)} → {percent(pooled)}" if rows[0]["relatives"] else percent(alone)


def gain(rows: Sequence[dict]) -> str:
    """Mean gain in points and its standard error, from the test examples that changed sides."""
    if not rows or not rows[0]["relatives"]:
        return ""
    count, won, lost = rows[0]["examples"], mean(r["won"] for r in rows), mean(r["lost"] for r in rows)
    error = max(won + lost - (won - lost) ** 2 / count, 0) ** 0.5 / count
    return f" ({100 * (won - lost) / count:+.0f} ± {100 * error:.0f})"


def central(rows: Sequence[dict], n: int) -> str:
    found = [row for row in rows if row["n"] == n]
    if not found:
        return "-"
    (row,) = found[-1:]
    alone = percent(row["alone_test"])
    return f"{alone} → {percent(row['pooled_test'])}" if "pooled_test" in row else alone


def line(spec: TaskSpec, probed: Sequence[dict], trained: Sequence[dict]) -> str:
    mine = [row for row in probed if row["task"] == spec.id]
    cells = [spec.name, percent(mine[0]["chance"]) if mine else "-"]
    for n in SIZES:
        rows = [row for row in mine if row["n"] == n]
        cells.append(arrow(rows) + gain(rows))
    for model in MODELS:
        of_model = [row for row in trained if row["task"] == spec.id and row["model"] == model]
        cells += [central(of_model, n) for n in SIZES[1:]]
    cells.append(" ".join(mine[0]["relatives"]) if mine else "")
    return "| " + " | ".join(cells) + " |"


def overall(probed: Sequence[dict]) -> str:
    """Mean gain of the trained tasks with strong relatives, over tasks and draws."""
    parts = []
    for n in SIZES:
        gains: dict[str, list[float]] = {}
        for row in probed:
            if row["n"] == n and row["relatives"] and row["task"][0] != "U":
                gains.setdefault(row["task"], []).append(row["pooled_test"] - row["test"])
        if gains:
            means = [mean(values) for values in gains.values()]
            spread = (sum((value - mean(means)) ** 2 for value in means) / max(len(means) - 1, 1) / len(means)) ** 0.5
            parts.append(f"{100 * mean(means):+.1f} ± {100 * spread:.1f} at n = {n} ({len(means)} tasks)")
    return "; ".join(parts)


def main() -> None:
    probed, trained = read("suite_probe.jsonl"), read("suite_central.jsonl")
    heads = ["task", "chance", *(f"probe, n = {n}" for n in SIZES)]
    heads += [f"{model}, n = {n}" for model in MODELS for n in SIZES[1:]] + ["relatives"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    lines += [line(spec, probed, trained) for spec in find_tasks([])]
    specs = {spec.id for spec in find_tasks([])}
    lines += [
        "",
        f"Mean gain of the probe over the trained tasks with relatives: {overall(probed)}.",
        "",
        f"Measured: the probe on {len({row['task'] for row in probed} & specs)} of {len(specs)} tasks, centralised "
        f"training on {len({row['task'] for row in trained} & specs)}.",
    ]
    page = PAGE.read_text(encoding="utf8")
    text = "\n".join(lines)
    page = re.sub(
        r"(<!-- headroom -->\n).*?(<!-- end headroom -->)", lambda m: m[1] + text + "\n" + m[2], page, flags=re.S
    )
    PAGE.write_text(page, encoding="utf8")


if __name__ == "__main__":
    main()
