"""Centralised training of the suite's tasks: what a model pair reaches on a task's own data, and on its relatives' too.

    python benchmarks/suite_central.py [TASK ...] [--models smollm2 gemma3] [--sizes 400] [--steps 240] [--layers 15]
        [--results suite-central.jsonl]

For every task, model and number n of training examples: an adapter of rank 16 in every linear layer of the frozen
language model and the projector, which starts from public captions, are trained on n examples of the task, and then
again on those and n of every task with a strong link. Validation and test accuracy are of the last step. Rows are kept
line by line, so the script goes on where it was stopped; a row costs minutes of a core.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import ConcatDataset, DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_pfl import CoLoRA
from lightning_pfl.benchmark.batches import TaskDataset, collate
from lightning_pfl.benchmark.features import EfficientNetTokens, FeatureStore
from lightning_pfl.benchmark.projector import load_projector
from lightning_pfl.benchmark.suite.catalogue import TASKS, find_task, find_tasks
from lightning_pfl.benchmark.suite.graph import relatives
from lightning_pfl.benchmark.suite.library import load_library
from lightning_pfl.benchmark.suite.recipes import SUITE, Sizes, build_task, chance
from lightning_pfl.benchmark.tasks import Task
from lightning_pfl.benchmark.vlm import Projector, VisionLanguageModule
from lightning_pfl.benchmark.weights import GEMMA3_270M, SMOLLM2_135M, load_language_model

MODELS = {"smollm2": SMOLLM2_135M, "gemma3": GEMMA3_270M}


def train(
    tasks: Sequence[Task],
    language_model: PreTrainedModel,
    projector: Projector,
    tokenizer: PreTrainedTokenizerBase,
    store: FeatureStore,
    *,
    steps: int,
    batch_size: int = 8,
    num_blocks: int = 4,
    seed: int = 0,
) -> tuple[float, float]:
    """Train on all tasks' training examples; validation and test accuracy on the first task."""
    L.seed_everything(seed, verbose=False)
    module = VisionLanguageModule(
        language_model, projector, lr=5e-4, lr_pq=5e-3, warmup_steps=steps // 10, train_projector=True
    )
    pooled = ConcatDataset([TaskDataset(task.train, tokenizer, store) for task in tasks])
    batches = DataLoader(pooled, batch_size, shuffle=True, collate_fn=collate, drop_last=len(pooled) >= batch_size)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=[CoLoRA(rank=16, alpha=32, num_blocks=num_blocks)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches)
    module.eval()
    return accuracy(module, tasks[0].val, tokenizer, store), accuracy(module, tasks[0].test, tokenizer, store)


def accuracy(module: VisionLanguageModule, examples, tokenizer: PreTrainedTokenizerBase, store: FeatureStore) -> float:
    loader = DataLoader(TaskDataset(examples, tokenizer, store), 32, collate_fn=collate)
    return float(torch.cat([module.score(batch).correct for batch in loader]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="*")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[400])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--layers", type=int, help="keep only the first so many layers of the language model")
    parser.add_argument("--results", type=Path, default=Path("suite-central.jsonl"))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    library, store = load_library(), FeatureStore(EfficientNetTokens())
    rows = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    done = {(row["suite"], row["task"], row["model"], row["layers"], row["n"], row["steps"]) for row in rows}
    trained = {spec.id for spec in TASKS}
    for spec in find_tasks(options.tasks):
        for n in options.sizes:
            others = [find_task(name) for name in relatives(spec.id) if name in trained]
            tasks = [build_task(one, library, Sizes(n, 100, 100)) for one in (spec, *others)]
            for name in options.models:
                if (SUITE, spec.id, name, options.layers, n, options.steps) in done:
                    continue
                scores, start = {}, time.process_time()
                for what, used in (("alone", tasks[:1]), ("pooled", tasks)):
                    if what == "pooled" and not others:
                        break
                    language_model, tokenizer = load_language_model(MODELS[name], options.layers)
                    projector = load_projector(language_model, tokenizer, store, name=MODELS[name])
                    val, test = train(used, language_model, projector, tokenizer, store, steps=options.steps)
                    scores |= {f"{what}_val": val, f"{what}_test": test}
                row = {
                    "suite": SUITE, "task": spec.id, "model": name, "layers": options.layers, "n": n,
                    "steps": options.steps, "chance": chance(tasks[0]), **scores,
                    "relatives": [one.id for one in others], "cpu_s": round(time.process_time() - start),
                }  # fmt: skip
                with options.results.open("a") as sink:
                    sink.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
