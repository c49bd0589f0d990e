"""How far cosines of sketches are from cosines of whole gradients, on the demo's clients.

    python -m benchmarks.sketch_sizes [--halves] [--examples 32] [--json]

The gradients are those that the demo's probe takes: SmolLM2-135M's last output projection (884,736 numbers), mean
over a client's first training examples. With ``--halves`` each client counts twice, with one half of its examples each,
which gives more pairs, some of them of one task. Per length of a sketch and wire format: its bytes, the largest and
the mean error of a cosine over all pairs and seeds, and Spearman's rank correlation of the cosines with those of whole
gradients, the lowest over seeds.
"""

from __future__ import annotations

import argparse
import json

import torch
from rich.console import Console
from torch import Tensor

from lightning_pfl import Bfloat16, Float32, Int8
from lightning_pfl.benchmark.batches import TaskDataset
from lightning_pfl.benchmark.states import LowerLayers, StateDataset
from lightning_pfl.benchmark.vlm import VisionLanguageModule
from lightning_pfl.demo.data import ProbeSet
from lightning_pfl.demo.materials import PackagedMaterials
from lightning_pfl.demo.plan import full_plan
from lightning_pfl.demo.progress import ConsoleProgress
from lightning_pfl.demo.run import quiet
from lightning_pfl.federation.letters import read_sketch, write_sketch
from lightning_pfl.functional.similarity import cosine_matrix
from lightning_pfl.relevance import CausalLMProbe, CountSketch

SIZES = (1024, 4096, 16_384, 65_536)
FORMATS = {"float32": Float32(), "bfloat16": Bfloat16(), "int8": Int8()}


def gradients(count: int, halves: bool) -> tuple[list[str], Tensor]:
    """One whole gradient per client (or half of one), as rows."""
    plan, materials = full_plan(), PackagedMaterials()
    progress = ConsoleProgress(Console())
    tasks = materials.tasks([client.task for client in plan.clients])
    examples = {name: task.train[:count] for name, task in tasks.items()}
    views = [view for some in examples.values() for example in some for view in example.images]
    materials.store.tokens(views, report=progress.count)
    model = plan.models[plan.anchor]
    language_model, tokenizer = materials.language_model(model)
    projector = materials.projector(model, language_model, tokenizer, report=progress.count)
    lower = LowerLayers(VisionLanguageModule(language_model, projector, lr=model.lr, lr_pq=model.lr_pq), num_kept=1)
    probe = CausalLMProbe(lower.cut().language_model)
    probe.prepare()
    names, rows = [], []
    for name, some in examples.items():
        shown = ProbeSet(StateDataset(TaskDataset(some, tokenizer, materials.store), lower))
        middle = len(shown) // 2
        parts = {"": range(len(shown))} if not halves else {" I": range(middle), " II": range(middle, len(shown))}
        for part, indices in parts.items():
            items = [shown[index] for index in indices]
            batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
            names.append(f"{name}{part}")
            rows.append(probe.gradient(batch).reshape(-1))
    return names, torch.stack(rows)


def pairs(matrix: Tensor) -> Tensor:
    """What stands above the diagonal."""
    count = len(matrix)
    return matrix[torch.triu(torch.ones(count, count, dtype=torch.bool), diagonal=1)]


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's, without ties."""
    ranks = torch.stack([one.argsort().argsort(), other.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def measure(rows: Tensor, size: int, wire: Float32 | Bfloat16 | Int8, seeds: int) -> dict[str, float]:
    """One length and format."""
    exact = pairs(cosine_matrix(rows))
    errors, ranks, nbytes = [], [], 0
    for seed in range(seeds):
        project = CountSketch(size, seed=seed)
        written = [write_sketch(project(row), wire) for row in rows]
        nbytes = len(written[0])
        found = pairs(cosine_matrix(torch.stack([read_sketch(data, wire) for data in written])))
        errors.append((found - exact).abs())
        ranks.append(rank_correlation(found, exact))
    every = torch.cat(errors)
    return {
        "size": size,
        "nbytes": nbytes,
        "largest": float(every.max()),
        "mean": float(every.mean()),
        "rank_correlation": min(ranks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--halves", action="store_true")
    parser.add_argument("--examples", type=int, default=32, help="per client")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    with quiet():
        names, rows = gradients(chosen.examples, chosen.halves)
    exact = pairs(cosine_matrix(rows))
    print(f"{len(names)} clients of {rows.shape[1]:,} numbers; cosines from {exact.min():.3f} to {exact.max():.3f}")
    print("| numbers | format | bytes | largest error | mean error | rank correlation |")
    print("| --- | --- | --- | --- | --- | --- |")
    for size in SIZES:
        for name, wire in FORMATS.items():
            found = measure(rows, size, wire, chosen.seeds)
            print(
                f"| {size:,} | {name} | {found['nbytes']:,} | {found['largest']:.4f} | {found['mean']:.4f} "
                f"| {found['rank_correlation']:.3f} |",
                flush=True,
            )
            if chosen.json:
                print(json.dumps({"format": name, **found}), flush=True)


if __name__ == "__main__":
    main()
