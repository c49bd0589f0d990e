"""Measure, for each task family, what pooling its tasks' data could bring.

    python benchmarks/task_headroom.py [FAMILY ...] [--write benchmarks/task_headroom.md]

For every task: chance, the test accuracy of a linear probe on the frozen features from n training examples of its own,
and from n examples of every task of its family. The difference is a hint, not a promise, of what collaboration between
the family's clients can bring; a family is kept if it reaches five points at some n. No federated method is run here,
and none was looked at when the families were chosen.

The probe is a ridge regression on one-hot answers, on the global token or on all five, whichever is better on the
task's validation split, as is the ridge. Training examples are drawn answer by answer, so that small samples are
balanced.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

from lightning_pfl.benchmark.families import DOMAINS, build_tasks
from lightning_pfl.benchmark.features import EfficientNetTokens, FeatureStore
from lightning_pfl.benchmark.tasks import Example, Task, balanced

SIZES = (16, 64, 320)
RIDGES = (0.01, 0.1, 1.0, 10.0)
Labelled = tuple[Tensor, Tensor]


def labelled(examples: Sequence[Example], store: FeatureStore) -> Labelled:
    """Tokens [n, 5, width] and answers [n] of single-picture examples."""
    tokens = store.tokens([example.images[0] for example in examples]).float()
    return tokens, torch.tensor([example.choices.index(example.answer) for example in examples])


def probe(train: Labelled, val: Labelled, test: Labelled, num_answers: int) -> float:
    """Test accuracy of the ridge regression that is best on `val`."""
    best = (-1.0, 0.0)
    for tokens in (1, 5):
        inputs = [side[0][:, :tokens].flatten(1) for side in (train, val, test)]
        centre, spread = inputs[0].mean(0), inputs[0].std(0) + 0.05
        seen, held_out, tested = ((side - centre) / spread for side in inputs)
        answers = torch.nn.functional.one_hot(train[1], num_answers).float()
        base, width = answers.mean(0), seen.shape[1]
        for ridge in RIDGES:
            dual = torch.linalg.solve(seen @ seen.T / width + ridge * torch.eye(len(seen)), answers - base)
            on_val, on_test = (
                float(((side @ seen.T / width @ dual + base).argmax(1) == truth).float().mean())
                for side, truth in ((held_out, val[1]), (tested, test[1]))
            )
            best = max(best, (on_val, on_test), key=lambda pair: pair[0])
    return best[1]


def draw(task: Task, size: int, seed: int) -> list[Example]:
    """A balanced sample of a task's training examples."""
    shuffled = list(task.train)
    random.Random(f"{task.name}/{seed}").shuffle(shuffled)
    return list(balanced(shuffled, size))


def measure(tasks: Sequence[Task], store: FeatureStore, seeds: int) -> list[str]:
    """Rows of the table for one family: each task, then the family."""
    sides = {task.name: (labelled(task.val, store), labelled(task.test, store)) for task in tasks}
    cells: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for size in SIZES:
        for seed in range(seeds):
            own = {task.name: labelled(draw(task, size, seed), store) for task in tasks}
            pooled = (torch.cat([one[0] for one in own.values()]), torch.cat([one[1] for one in own.values()]))
            for task in tasks:
                scores = (probe(data, *sides[task.name], len(task.choices)) for data in (own[task.name], pooled))
                cells.setdefault((task.name, size), []).append((next(scores), next(scores)))
    rows = []
    for task in tasks:
        counts = f"{len(task.train)} / {len(task.val)} / {len(task.test)}"
        row = f"| {task.name} | {counts} | {100 * task.chance:.0f} |"
        for size in SIZES:
            one, many = (mean(pair[index] for pair in cells[task.name, size]) for index in (0, 1))
            row += f" {100 * one:.0f} → {100 * many:.0f} |"
        rows.append(row)
    gains = []
    for size in SIZES:
        by_seed = [
            mean(cells[task.name, size][seed][1] - cells[task.name, size][seed][0] for task in tasks)
            for seed in range(seeds)
        ]
        gains.append(f" **{100 * mean(by_seed):+.1f}** ± {100 * stdev(by_seed) / seeds**0.5:.1f} |")
    return [*rows, f"| **{tasks[0].family}** | | |" + "".join(gains)]


def main() -> None:
    """Print the table, family by family."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", default=list(DOMAINS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    store = FeatureStore(EfficientNetTokens())
    heads = [f"n = {size}" for size in SIZES]
    lines = [f"| task | train / val / test | chance | {' | '.join(heads)} |", "| --- " * 6 + "|"]
    print("\n".join(lines), flush=True)
    for family in options.families:
        rows = measure(build_tasks([family]), store, options.seeds)
        print("\n".join(rows), flush=True)
        lines += rows
    if options.write:
        note = (
            "Test accuracy in percent of a linear probe on frozen features: from n examples of the task's own → from n "
            "of every task of its family; in bold the mean gain over the family's tasks ± its standard error over "
            f"{options.seeds} draws. Tasks with fewer than n training examples use all they have. "
            "Made by `benchmarks/task_headroom.py`."
        )
        options.write.write_text(f"# Pooling headroom of the task families\n\n{note}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
