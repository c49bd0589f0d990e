"""Centralised training of the suite's tasks: what a model pair reaches on a task's own data, and on its relatives' too.

    python benchmarks/suite_central.py [TASK ...] [--models smollm2 gemma3] [--sizes 64 320] [--results FILE.jsonl]

For every task, model (whole, not cut) and number n of training examples: adapters of rank 16 in the last layers of the
frozen language model are trained on n examples of the task, and then again on those and n of every task with a strong
link that clients train on. Pictures come in by the projector that is pre-trained on public captions. What lies below
the trained layers is run once per example (`lightning_pfl.benchmark.states`), as in the demo. Validation and test
accuracy are of the last step; the learning rates are the demo's. Rows are kept line by line, so the script goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import final

import lightning as L
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from lightning_pfl import CoLoRA
from lightning_pfl.benchmark.batches import TaskDataset
from lightning_pfl.benchmark.features import EfficientNetTokens, FeatureStore
from lightning_pfl.benchmark.projector import load_projector
from lightning_pfl.benchmark.states import LowerLayers, StateDataset, collate_states
from lightning_pfl.benchmark.suite.catalogue import TASKS, find_task, find_tasks
from lightning_pfl.benchmark.suite.graph import relatives
from lightning_pfl.benchmark.suite.library import Library, load_library
from lightning_pfl.benchmark.suite.recipes import SUITE, Sizes, TaskSpec, build_task, chance
from lightning_pfl.benchmark.vlm import VisionLanguageModule
from lightning_pfl.benchmark.weights import GEMMA3_270M, SMOLLM2_135M, load_language_model

MODELS = {"smollm2": SMOLLM2_135M, "gemma3": GEMMA3_270M}
TRAINED = {spec.id for spec in TASKS}


@final
class Reader:
    """One model: its frozen part as states of examples, its trained part as copies of the last layers."""

    def __init__(self, model: str, kept: int, library: Library, store: FeatureStore, sizes: Sizes) -> None:
        language_model, self.tokenizer = load_language_model(MODELS[model])
        projector = load_projector(language_model, self.tokenizer, store, name=MODELS[model])
        whole = VisionLanguageModule(language_model, projector)
        self.upper = LowerLayers(copy.deepcopy(whole), kept).cut()
        self._lower = LowerLayers(whole, kept)
        self._library, self._store, self._sizes = library, store, sizes
        self._known: dict[tuple[str, str], StateDataset] = {}

    def states(self, spec: TaskSpec, split: str) -> StateDataset:
        """A split's examples as the trained layers see them; the last few are remembered."""
        key = (spec.name, split)
        if key not in self._known:
            while len(self._known) >= 12:
                del self._known[next(iter(self._known))]
            task = build_task(spec, self._library, self._sizes)
            examples = TaskDataset(getattr(task, split), self.tokenizer, self._store)
            self._known[key] = StateDataset(examples, self._lower, batch_size=32)
        return self._known[key]

    def trained(
        self, data: Sequence[Dataset], *, steps: int, batch_size: int, lr: float, lr_pq: float
    ) -> VisionLanguageModule:
        """A copy of the last layers after so many steps on all of the data together."""
        L.seed_everything(0, verbose=False)
        upper = copy.deepcopy(self.upper)
        module = VisionLanguageModule(
            upper.language_model, upper.projector, lr=lr, lr_pq=lr_pq, warmup_steps=steps // 10
        )
        pool = ConcatDataset(data)
        batches = DataLoader(
            pool, batch_size, shuffle=True, collate_fn=collate_states, drop_last=len(pool) >= batch_size
        )
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            callbacks=[CoLoRA(rank=16, alpha=32, num_blocks=1, exclude_modules=["projector"])],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, batches)
        return module.eval()


def accuracy(module: VisionLanguageModule, states: StateDataset) -> float:
    loader = DataLoader(states, 50, collate_fn=collate_states)
    return float(torch.cat([module.score(batch).correct for batch in loader]).float().mean())


def first(states: StateDataset, n: int) -> Subset:
    """The first n examples: balanced, as every prefix of a task is."""
    return Subset(states, range(min(n, len(states))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="*")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS, reverse=True))
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 320])
    parser.add_argument("--val", type=int, default=50)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--kept", type=int, default=1, help="last layers that are trained")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--lr-pq", type=float, default=2e-2)
    parser.add_argument("--alone", action="store_true", help="without relatives")
    parser.add_argument("--seconds", type=float, help="start no further row after so many CPU-seconds")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("suite_central.jsonl"))
    options = parser.parse_args()
    for name in ("lightning.pytorch", "lightning_pfl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    library, store = load_library(), FeatureStore(EfficientNetTokens())
    rows = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    said = ("suite", "task", "model", "kept", "n", "steps", "batch", "lr", "lr_pq", "test_examples")
    done = {tuple(row[name] for name in said) for row in rows}
    sizes = Sizes(max(options.sizes), options.val, options.test)
    begun = time.process_time()
    for model in options.models:
        reader: Reader | None = None
        for spec in find_tasks(options.tasks):
            names = [] if options.alone else [name for name in relatives(spec.id) if name in TRAINED]
            for n in options.sizes:
                row = {
                    "suite": SUITE, "task": spec.id, "model": model, "kept": options.kept, "n": n,
                    "steps": options.steps, "batch": options.batch, "lr": options.lr, "lr_pq": options.lr_pq,
                    "test_examples": options.test,
                }  # fmt: skip
                if tuple(row.values()) in done:
                    continue
                start = time.process_time()
                if options.seconds is not None and start - begun > options.seconds:
                    return
                reader = reader or Reader(model, options.kept, library, store, sizes)
                settings = {"steps": options.steps, "batch_size": options.batch, "lr": options.lr}
                own = first(reader.states(spec, "train"), n)
                theirs = [first(reader.states(find_task(name), "train"), n) for name in names]
                for what, data in (("alone", [own]), ("pooled", [own, *theirs])):
                    if what == "pooled" and not theirs:
                        break
                    module = reader.trained(data, lr_pq=options.lr_pq, **settings)
                    row |= {
                        f"{what}_{split}": accuracy(module, reader.states(spec, split)) for split in ("val", "test")
                    }
                row |= {
                    "chance": chance(build_task(spec, library, sizes)), "relatives": names,
                    "cpu_s": round(time.process_time() - start, 1),
                }  # fmt: skip
                with options.results.open("a") as sink:
                    sink.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
