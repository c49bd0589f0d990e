"""Markdown tables from the JSON lines of a run: `python -m benchmarks.alignment_transfer.report FILES`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def main() -> None:
    """One line per form and direction, means over tasks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    args = parser.parse_args()
    print("| models (first: anchor) | form | from | into | loss zero / own / transferred | accuracy | recovered |")
    print("|" + " --- |" * 7)
    for path in args.files:
        for text in path.read_text().splitlines():
            line = json.loads(text)
            for into, rows in line["into"].items():
                for source in line["models"]:
                    if source != into:
                        told = " | ".join(_cells(rows, source))
                        print(f"| {', '.join(line['models'])} | {line['form']} | {source} | {into} | {told} |")


def _cells(rows: Sequence[Mapping[str, Any]], source: str) -> tuple[str, str, str]:
    zero, own, other = (
        [sum(row[name][index] for row in rows) / len(rows) for index in (0, 1)] for name in ("zero", "own", source)
    )
    recovered = (zero[0] - other[0]) / (zero[0] - own[0])
    losses, accuracies = zip(zero, own, other, strict=True)
    return (
        " / ".join(f"{loss:.3f}" for loss in losses),
        " / ".join(f"{accuracy:.3f}" for accuracy in accuracies),
        f"{recovered:.2f}",
    )


if __name__ == "__main__":
    main()
