"""The demo's clients under several methods and seeds: does exchange pay, and which?

    python -m benchmarks.demo_methods OUT.jsonl [--side val|test] [--seeds 0 1 2] [--methods local relevance ...]
    python -m benchmarks.demo_methods OUT.jsonl --table

Everything is the demo's (`lightning_pfl.demo`): models, tasks, alignment, steps. Only the aggregator and the seed
differ, and the side of the split that is scored: choices are made on ``val``. One JSON line per (side, seed, method);
what is there already is not run again. Models are aligned once, with the plan's own seed; the seed of a run decides who
sees which batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console

from lightning_pfl import FedAvg, LocalOnly, RelevanceAggregator, Towards, Uniform, UniformAggregator
from lightning_pfl.aggregation import Aggregator
from lightning_pfl.benchmark.tasks import Task
from lightning_pfl.demo.materials import PackagedMaterials
from lightning_pfl.demo.plan import Plan, full_plan
from lightning_pfl.demo.preparation import prepare
from lightning_pfl.demo.progress import ConsoleProgress
from lightning_pfl.demo.run import Method, quiet, train
from lightning_pfl.demo.scores import Scores
from lightning_pfl.federation import LocalPool

ALL = Uniform(include_self=True)
METHODS: Mapping[str, Callable[[], Aggregator]] = {
    "local": LocalOnly,
    "fedavg": FedAvg,
    "uniform": UniformAggregator,
    "the paper's": RelevanceAggregator.paper,
    "ours": RelevanceAggregator,
    "a frozen mixture of relatives": lambda: RelevanceAggregator(pull=0, global_branch=True),
    "ours, with a frozen mixture": lambda: RelevanceAggregator(global_branch=True),
    "pull to all": lambda: RelevanceAggregator(warm_start=Towards(ALL, 0.3)),
}


class OnValidation:
    """Packaged materials whose tests are the validation sides."""

    def __init__(self) -> None:
        self._packaged = PackagedMaterials()

    def __getattr__(self, name: str) -> object:
        return getattr(self._packaged, name)

    def tasks(self, names: Sequence[str]) -> dict[str, Task]:
        built = self._packaged.tasks(names)
        return {name: dataclasses.replace(task, test=task.val) for name, task in built.items()}


def row(scores: Scores, side: str, seed: int) -> dict[str, object]:
    per_client = {client: round(100 * scores.on_own(client).share, 2) for client in scores.counts}
    own, others = 100 * scores.self_mean(), 100 * scores.others_mean()
    return {
        "method": scores.method,
        "side": side,
        "seed": seed,
        "self": round(own, 2),
        "others": round(others, 2),
        "by_client": per_client,
    }


def run(out: Path, plan: Plan, side: str, seeds: Sequence[int], names: Sequence[str]) -> None:
    done = {(line["side"], line["seed"], line["method"]) for line in read(out)}
    todo = [(seed, name) for seed in seeds for name in names if (side, seed, name) not in done]
    if not todo:
        return
    progress = ConsoleProgress(Console())
    with quiet():
        prepared = prepare(plan, OnValidation() if side == "val" else PackagedMaterials(), progress)  # type: ignore[arg-type]
        for seed, name in todo:
            progress.stage(f"seed {seed}: {name}")
            seeded = dataclasses.replace(plan, seed=seed)
            _, scores = train(seeded, Method(name, METHODS[name]()), prepared, out.parent / "logs", LocalPool())
            line = row(scores, side, seed)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            progress.stage(f"Self {line['self']}, Others {line['others']}")


def read(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []


def table(lines: Sequence[dict]) -> str:
    """Means and paired differences to local training, with standard errors over seeds."""
    cells = {(line["side"], line["seed"], line["method"]): line for line in lines}
    text = ["| side | method | seeds | Self | Others | Self - local | Others - local |", "| --- " * 7 + "|"]
    for side in sorted({line["side"] for line in lines}):
        for name in METHODS:
            seeds = [seed for s, seed, m in cells if s == side and m == name and (side, seed, "local") in cells]
            if not seeds:
                continue
            found = [f"| {side} | {name} | {len(seeds)}"]
            found += [
                f"{mean(cells[side, seed, name][measure] for seed in seeds):.1f}" for measure in ("self", "others")
            ]
            for measure in ("self", "others"):
                gains = [cells[side, seed, name][measure] - cells[side, seed, "local"][measure] for seed in seeds]
                error = f" ± {stdev(gains) / len(gains) ** 0.5:.1f}" if len(gains) > 1 else ""
                found.append(f"{mean(gains):+.1f}{error}")
            text.append(" | ".join(found) + " |")
    return "\n".join(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--side", choices=("val", "test"), default="val")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--table", action="store_true")
    chosen = parser.parse_args()
    if not chosen.table:
        run(chosen.out, full_plan(), chosen.side, chosen.seeds, chosen.methods)
    print(table(read(chosen.out)))
