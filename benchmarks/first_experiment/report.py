"""Tables from the JSON lines: paired differences to a control, mean and standard error over cells."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

MEASURES = ("self", "others", "seen", "unseen", "novel", "self_lik", "others_lik")


def load(paths: list[Path]) -> dict[tuple[str, int, int, str], dict[str, dict[str, float]]]:
    """Rows by cell (scenario, samples, seed, alignment) and method; a later line replaces an earlier one."""
    cells: dict[tuple[str, int, int, str], dict[str, dict[str, float]]] = defaultdict(dict)
    for path in paths:
        for line in path.read_text(encoding="utf8").splitlines():
            r = json.loads(line)
            cells[(r["scenario"], r["n"], r["seed"], r.get("align", ""))][r["method"]] = r
    return cells


def paired(cells, method: str, control: str, measure: str) -> tuple[float, float, int]:
    """Mean difference to the control, its standard error over cells, number of cells (likelihood in hundredths of a
    nat).
    """
    k = 100.0 if measure.endswith("lik") else 1.0
    d = [k * (c[method][measure] - c[control][measure]) for c in cells.values() if method in c and control in c]
    return (
        (float(np.mean(d)), float(np.std(d, ddof=1) / len(d) ** 0.5) if len(d) > 1 else float("nan"), len(d))
        if d
        else (float("nan"),) * 3
    )


def table(cells, control: str, methods: list[str] | None = None) -> str:
    """Markdown: one row per method."""
    names = methods or sorted(
        {m for c in cells.values() for m in c},
        key=lambda m: -np.nan_to_num(paired(cells, m, control, "self_lik")[0], nan=-99),
    )
    out = [
        f"| method, minus {control} | cells | Self | Others | seen family | unseen family | novel | "
        "Self lik. (0.01 nat) | Others lik. |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for m in names:
        cols = []
        for k in MEASURES:
            d, s, n = paired(cells, m, control, k)
            cols.append(f"{d:+.1f} +- {s:.1f}" if n and n > 1 else f"{d:+.1f}")
        out.append(f"| {m} | {paired(cells, m, control, 'self')[2]} | " + " | ".join(cols) + " |")
    base = [c[control] for c in cells.values() if control in c]
    out.append(f"\n{control}: " + ", ".join(f"{k} {np.mean([r[k] for r in base]):.2f}" for k in MEASURES))
    return "\n".join(out)


def main() -> None:
    """Print the table of the cells that match."""
    p = argparse.ArgumentParser()
    p.add_argument("files", type=Path, nargs="+")
    p.add_argument("--control", default="local")
    p.add_argument("--scenario")
    p.add_argument("--n", type=int)
    p.add_argument("--align")
    p.add_argument("--methods", nargs="*")
    v = p.parse_args()
    cells = {
        k: c
        for k, c in load(v.files).items()
        if (not v.scenario or k[0] == v.scenario) and (not v.n or k[1] == v.n) and (not v.align or k[3] == v.align)
    }
    print(table(cells, v.control, v.methods))


if __name__ == "__main__":
    main()
