"""Tables of paired differences to training alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

MEASURES = ("self", "others", "related", "unrelated", "self_lik", "others_lik")


def table(files: Sequence[Path]) -> str:
    """One Markdown table per (scenario, alignment, side, n); mean over seeds ± standard error."""
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    groups: dict[tuple[object, ...], dict[tuple[str, int], dict]] = {}
    for line in lines:
        if line["set"] != "tune":
            group = groups.setdefault((line["scenario"], line["alignment"], line["side"], line["n"]), {})
            group[line["method"], line["seed"]] = line
    return "\n\n".join(_one(key, cells) for key, cells in sorted(groups.items())) + _tuning(lines)


def _one(key: tuple[object, ...], cells: dict[tuple[str, int], dict]) -> str:
    alone = {seed: line for (method, seed), line in cells.items() if method == "local"}
    level = ", ".join(f"{name} {mean(line[name] for line in alone.values()):.2f}" for name in MEASURES)
    text = [
        f"### {key[0]}, {key[1]}, {key[3]} samples, {key[2]} side: minus training alone",
        f"Training alone: {level}. Likelihood in hundredths of a nat.",
        "| method | seeds | " + " | ".join(MEASURES) + " | Self before the last exchange |",
        "| --- " * (len(MEASURES) + 3) + "|",
    ]
    for method in dict.fromkeys(method for method, _ in cells):
        seeds = [seed for seed in alone if (method, seed) in cells]
        shown = [_paired(cells, alone, method, seeds, name) for name in (*MEASURES, "self_before")]
        text.append(f"| {method} | {len(seeds)} | " + " | ".join(shown) + " |")
    return "\n".join(text)


def _paired(cells: dict, alone: dict, method: str, seeds: Sequence[int], measure: str) -> str:
    factor = 100 if measure.endswith("_lik") else 1
    gains = [factor * (cells[method, seed][measure] - alone[seed][measure]) for seed in seeds]
    error = f" ± {stdev(gains) / len(gains) ** 0.5:.1f}" if len(gains) > 1 else ""
    return f"{mean(gains):+.1f}{error}"


def _tuning(lines: Sequence[dict]) -> str:
    cells: dict[tuple[int, str, float], list[float]] = {}
    for line in lines:
        if line["set"] == "tune":
            cells.setdefault((line["n"], line["method"], line["lr"]), []).append(line["self"])
    rows = [f"| {n} | {method} | {lr:g} | {mean(values):.1f} |" for (n, method, lr), values in cells.items()]
    head = "\n\n### learning rates: Self on validation\n| samples | method | rate | Self |\n| --- | --- | --- | --- |\n"
    return head + "\n".join(rows) if rows else ""
