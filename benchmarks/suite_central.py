"""Centralised training of the suite's tasks: what a model reaches on a task's own data, and on its relatives' too.

    python benchmarks/suite_central.py [TASK ...] [--models smollm2 gemma3] [--sizes 16 64 320] [--seeds 1]

For every model of the suite protocol (`lightning_pfl/comparison/protocols/suite.yaml`: whole, adapters in its last
layer) and number n of training examples: adapters are trained on n examples of a task, and then again, for as many
steps, on those and n of every task with a strong link that clients train on. The steps show as many examples as a
client of the full protocol sees for one task. Nothing is chosen on the way: test accuracy is of the last step, learning
rates are the protocol's.

What lies below the last layer is run once per example and kept on disk, and the examples are those of the comparison:
where a comparison of that protocol has been prepared, less is left to run. Rows are kept line by line, so the script
goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import final

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from lightning_pfl import CoLoRA
from lightning_pfl.benchmark.features import EfficientNetTokens, FeatureStore
from lightning_pfl.benchmark.packages import cache_dir
from lightning_pfl.benchmark.projector import load_projector
from lightning_pfl.benchmark.suite.catalogue import TASKS, UNSEEN, find_tasks
from lightning_pfl.benchmark.suite.graph import relatives
from lightning_pfl.benchmark.suite.library import load_library
from lightning_pfl.benchmark.suite.recipes import SUITE, Sizes, build_task, chance
from lightning_pfl.benchmark.tasks import Task
from lightning_pfl.benchmark.vlm import VisionLanguageModule
from lightning_pfl.benchmark.weights import load_language_model
from lightning_pfl.comparison.data import Examples, collate_examples
from lightning_pfl.comparison.plan import Protocol, read_protocol
from lightning_pfl.comparison.reading import Reader

TRAINED = {spec.id for spec in TASKS}
SIDES = ("train", "test")
QUESTIONS = 100


@final
class Model:
    """One language model: all tasks as its last layer sees them, and that layer to train copies of."""

    def __init__(self, key: str, protocol: Protocol, tasks: Mapping[str, Task], store: FeatureStore) -> None:
        language = protocol.models[key]
        language_model, tokenizer = load_language_model(language.name, language.num_layers)
        projector = load_projector(language_model, tokenizer, store, name=language.name)
        whole = VisionLanguageModule(language_model, projector, lr=language.lr, lr_pq=language.lr_pq)
        reader = Reader(whole, tokenizer, store, kept_layers=protocol.kept_layers, folder=cache_dir() / "states")
        told = {(name, side): reader.tokenised(getattr(task, side)) for name, task in tasks.items() for side in SIDES}
        reader.keep_answers(told.values())
        self.examples: dict[tuple[str, str], Examples] = {place: reader.examples(one) for place, one in told.items()}
        self._last = reader.ready()
        self._protocol = protocol
        self.steps = steps_of(protocol)

    def trained(self, data: Sequence[Dataset], seed: int) -> VisionLanguageModule:
        """A copy of the last layer after one task's steps on all of the data together."""
        protocol = self._protocol
        L.seed_everything(seed, verbose=False)
        module = copy.deepcopy(self._last)
        pool = ConcatDataset(data)
        batches = DataLoader(pool, protocol.batch_size, shuffle=True, collate_fn=collate_examples, drop_last=True)
        adapters = CoLoRA(protocol.rank, protocol.alpha, num_blocks=protocol.num_blocks, exclude_modules=["projector"])
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=self.steps,
            max_epochs=-1,
            callbacks=[adapters],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, batches)
        return module.eval()


def steps_of(protocol: Protocol) -> int:
    """Until as many examples were seen as a client of the full protocol sees of one task."""
    full = read_protocol("full")
    return round(full.rounds_per_task * full.steps * full.batch_size / protocol.batch_size)


def right(module: VisionLanguageModule, questions: Examples) -> Tensor:
    """Which ones are answered right."""
    loader = DataLoader(questions, 64, collate_fn=collate_examples)
    return torch.cat([module.score(batch).correct for batch in loader])


def measured(model: Model, task: str, n: int, seed: int) -> dict[str, object]:
    """One row: alone, and with relatives where there are some."""
    names = [name for name in relatives(task) if name in TRAINED]
    own, *theirs = (Subset(model.examples[name, "train"], range(n)) for name in (task, *names))
    questions = model.examples[task, "test"]
    alone = right(model.trained([own], seed), questions)
    pooled = right(model.trained([own, *theirs], seed), questions) if theirs else alone
    return {
        "examples": len(alone), "test": float(alone.float().mean()), "pooled_test": float(pooled.float().mean()),
        "won": int((pooled & ~alone).sum()), "lost": int((alone & ~pooled).sum()), "relatives": names,
    }  # fmt: skip


def main() -> None:
    protocol = read_protocol("suite")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="*")
    parser.add_argument("--models", nargs="+", choices=sorted(protocol.models), default=list(protocol.models))
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64, 320])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("suite_central.jsonl"))
    options = parser.parse_args()
    for name in ("lightning.pytorch", "lightning_pfl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    library, store = load_library(), FeatureStore(EfficientNetTokens())
    rows = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    about = {"suite": SUITE, "steps": steps_of(protocol), "batch": protocol.batch_size}
    said = (*about, "task", "model", "lr", "lr_pq", "n", "seed")
    done = [{name: row[name] for name in said} for row in rows]
    sizes = Sizes(max(options.sizes), 1, QUESTIONS)
    tasks = {spec.id: build_task(spec, library, sizes) for spec in (*TASKS, *UNSEEN)}
    wanted = [spec.id for spec in find_tasks(options.tasks)]
    models: dict[str, Model] = {}
    for seed in range(options.seeds):
        for key in options.models:
            rates = {"lr": protocol.models[key].lr, "lr_pq": protocol.models[key].lr_pq}
            for n in options.sizes:
                for task in wanted:
                    row = {**about, "task": task, "model": key, **rates, "n": n, "seed": seed}
                    if row in done:
                        continue
                    if key not in models:
                        models[key] = Model(key, protocol, tasks, store)
                    start = time.process_time()
                    row |= {"chance": chance(tasks[task]), **measured(models[key], task, n, seed)}
                    row["cpu_s"] = round(time.process_time() - start, 1)
                    with options.results.open("a") as sink:
                        sink.write(json.dumps(row) + "\n")
                    print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
