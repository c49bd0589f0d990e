"""Tables of paired differences to training alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

MEASURES = {"self": "Self", "related": "relatives' tasks", "unrelated": "others' tasks", "self_lik": "Self likelihood"}

Cells = dict[tuple[str, int, int], dict]
"""Lines by method, samples and seed."""


def table(files: Sequence[Path]) -> str:
    """One Markdown table per (scenario, alignment, side): mean over seeds ± standard error, samples abreast."""
    lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    groups: dict[tuple[str, str, str], Cells] = {}
    for line in lines:
        if line["set"] != "tune":
            group = groups.setdefault((line["scenario"], line["alignment"], line["side"]), {})
            group[line["method"], line["n"], line["seed"]] = line
    parts = [_one(key, cells) for key, cells in sorted(groups.items())]
    return "\n\n".join([*parts, *_tuning(lines)])


def _one(key: tuple[str, str, str], cells: Cells) -> str:
    scenario, alignment, side = key
    sizes = sorted({n for _, n, _ in cells})
    heads = [f"{n}: {name}" for n in sizes for name in MEASURES.values()]
    levels = []
    for n in sizes:
        alone = [line for (method, size, _), line in cells.items() if method == "local" and size == n]
        shown = ", ".join(f"{name} {mean(line[measure] for line in alone):.1f}" for measure, name in MEASURES.items())
        levels.append(f"{n} samples ({len(alone)} seeds): {shown}")
    text = [
        f"### {scenario}, {alignment}, {side}",
        "",
        f"Training alone: {'; '.join(levels)}. All others: minus that, likelihoods in hundredths of a nat.",
        "",
        "| method | " + " | ".join(heads) + " |",
        "| --- " * (len(heads) + 1) + "|",
    ]
    for method in dict.fromkeys(method for method, _, _ in cells):
        if method != "local":
            found = [_paired(cells, method, n, measure) for n in sizes for measure in MEASURES]
            text.append(f"| {method} | " + " | ".join(found) + " |")
    return "\n".join(text)


def _paired(cells: Cells, method: str, n: int, measure: str) -> str:
    factor = 100 if measure.endswith("_lik") else 1
    seeds = [seed for name, size, seed in cells if name == method and size == n and ("local", n, seed) in cells]
    gains = [factor * (cells[method, n, seed][measure] - cells["local", n, seed][measure]) for seed in seeds]
    if not gains:
        return ""
    error = f" ± {stdev(gains) / len(gains) ** 0.5:.1f}" if len(gains) > 1 else ""
    return f"{mean(gains):+.1f}{error}"


def _tuning(lines: Sequence[dict]) -> list[str]:
    cells: dict[tuple[int, str, float], dict] = {(x["n"], x["method"], x["lr"]): x for x in lines if x["set"] == "tune"}
    rates = sorted({rate for _, _, rate in cells})
    if not rates:
        return []
    text = [
        "### Learning rates: Self in percent, likelihood in nats, on validation",
        "",
        "| samples | method | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "| --- " * (len(rates) + 2) + "|",
    ]
    for n, method in dict.fromkeys((n, method) for n, method, _ in sorted(cells)):
        found = [cells.get((n, method, rate)) for rate in rates]
        shown = [f"{x['self']:.1f}, {x['self_lik']:.2f}" if x else "" for x in found]
        text.append(f"| {n} | {method} | " + " | ".join(shown) + " |")
    return ["\n".join(text)]
