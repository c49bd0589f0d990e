"""One run: a method and a seed, from the adapters' start to the last evaluation.

Start at `run_one`. A run that was stopped goes on from the checkpoint of its last whole round, to the same numbers.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_pfl.aggregation import LocalOnly
from lightning_pfl.benchmark.vlm import VisionLanguageModule
from lightning_pfl.callbacks.colora import CoLoRA
from lightning_pfl.callbacks.relevance_probe import RelevanceProbe
from lightning_pfl.callbacks.routing_keys import RoutingKeys
from lightning_pfl.comparison.data import (
    answer_logits,
    answer_losses,
    answer_outputs,
    collate_for_client,
    to_probe,
    to_reader,
)
from lightning_pfl.comparison.evaluation import Evaluator, Questions
from lightning_pfl.comparison.making import make_method
from lightning_pfl.comparison.newcomers import welcome
from lightning_pfl.comparison.plan import Comparison, MethodPlan, slug
from lightning_pfl.comparison.preparation import Prepared
from lightning_pfl.comparison.record import Record, Rows
from lightning_pfl.data import DynamicStream, StaticStream, StreamDataModule, measured_cost
from lightning_pfl.data.flops import StepCost
from lightning_pfl.federation import Client, FederatedStrategy, LocalPool
from lightning_pfl.methods import Method

__all__ = ["Bench", "run_one"]


@final
@dataclass(frozen=True, eq=False)
class Bench:
    """Where runs of a comparison take place.

    Attributes:
        comparison: what is compared.
        prepared: what its runs share.
        questions: by key of a model, per task.
        accelerator: of clients, as a Trainer takes it: "cpu", "gpu" or "auto".
    """

    comparison: Comparison
    prepared: Prepared
    questions: dict[str, list[Questions]]
    accelerator: str = "cpu"

    @staticmethod
    def of(comparison: Comparison, prepared: Prepared, *, accelerator: str = "cpu") -> Bench:
        """With questions in batches."""
        size = comparison.protocol.questions_at_once
        questions = {key: [Questions(one, size) for one in sets] for key, sets in prepared.questions.items()}
        return Bench(comparison, prepared, questions, accelerator)


def run_one(
    bench: Bench, name: str, seed: int, folder: Path, *, tell: Callable[[int], None] = lambda _: None
) -> Record:
    """Train and test all clients by one method.

    Args:
        bench: where.
        name: of the method, in the comparison.
        seed: which batches are met, and what is drawn at random.
        folder: for checkpoints; removed when the run is finished.
        tell: is told how many rounds are done.

    Returns:
        What came out.

    Raises:
        ValueError: a method with arguments that are not right, or that does not fit the clients.
    """
    comparison, prepared = bench.comparison, bench.prepared
    protocol, plan = comparison.protocol, comparison.method(name)
    L.seed_everything(seed, verbose=False)
    method = make_method(plan, given(comparison, prepared, seed))
    modules = {key: _module(module, plan) for key, module in prepared.modules.items()}
    sources = {key: _Same(module) for key, module in modules.items()}
    data = {client.id: _data(bench, client.id, seed) for client in prepared.clients}
    strategy = FederatedStrategy(
        clients=[Client(one.id, model=sources[one.model], datamodule=data[one.id]) for one in prepared.clients],
        aggregator=method.aggregator,
        pool=LocalPool(),
        seed=seed,
    )
    is_alone = isinstance(method.aggregator, LocalOnly)  # clients send it what they share, and it is not looked at
    exchanges = not is_alone or method.aggregator.uses_global_branch
    device = torch.device("cuda" if bench.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    evaluator = Evaluator(
        prepared, bench.questions, protocol, exchanges=exchanges, answering=method.answering, device=device, tell=tell
    )
    keys = method.answering is not None
    callbacks: list[L.Callback] = [*method.callbacks, evaluator]
    if keys:
        callbacks.append(RoutingKeys(prepared.probe, to_reader=to_reader))
    if method.aggregator.needs_sketches:
        callbacks.append(RelevanceProbe(prepared.probe, to_probe=to_probe, every_n_steps=protocol.probe_every))
    callbacks.append(ModelCheckpoint(folder, filename="round-{epoch}", save_top_k=1, save_on_train_epoch_end=True))
    trainer = L.Trainer(
        max_epochs=protocol.num_rounds,
        accelerator=bench.accelerator,
        devices=1,
        callbacks=callbacks,
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,  # the evaluator asks; a validation would cost every client another turn
    )
    first = prepared.clients[0]
    trainer.fit(modules[first.model], data[first.id], ckpt_path=last_checkpoint(folder))
    newcomers = welcome(
        strategy,
        prepared.unseen,
        sources.__getitem__,
        [callback for callback in method.callbacks if isinstance(callback, CoLoRA)],
        steps=comparison.newcomer_steps,
        batch_size=protocol.batch_size,
        questions_at_once=protocol.questions_at_once,
        seed=seed,
        accelerator=bench.accelerator,
    )
    costs = _costs(bench, method, modules)
    steps = protocol.num_rounds * protocol.steps
    operations = sum(_operations(costs[client.model], method, steps) for client in prepared.clients)
    last = strategy.relevance[-1]
    record = Record(
        method=name,
        seed=seed,
        key=comparison.key(name),
        about={
            "title": comparison.title,
            "role": plan.role,
            "place": list(comparison.methods).index(name),
            "scenario": comparison.scenario,
            "assignment": list(comparison.assignment),
            "side": comparison.side,
            "rounds": protocol.num_rounds,
            "steps": protocol.steps,
            "batch_size": protocol.batch_size,
            "num_train": protocol.num_train,
            **plan.described(),
        },
        clients=[client.id for client in prepared.clients],
        models=[client.model for client in prepared.clients],
        tasks=list(prepared.tasks),
        own=[list(client.tasks) for client in prepared.clients],
        chance=list(prepared.chance.values()),
        relations=prepared.relations.tolist(),
        tables=evaluator.tables,
        weights=_rows(last.weights),
        similarity=_rows(last.similarity),
        sent=[0 if is_alone and not keys else strategy.traffic[client.id].up for client in prepared.clients],
        received=[strategy.traffic[client.id].down + evaluator.held.get(client.id, 0) for client in prepared.clients],
        operations=operations,
        seconds=evaluator.seconds,
        versions=versions(),
        newcomers=newcomers,
    )
    shutil.rmtree(folder, ignore_errors=True)
    for parent in (folder.parent, folder.parent.parent):
        if parent.is_dir() and parent.name in ("unfinished", slug(name)) and not any(parent.iterdir()):
            parent.rmdir()
    return record


def given(comparison: Comparison, prepared: Prepared, seed: int) -> dict[str, Any]:
    """What every method's function may take, by name."""
    protocol = comparison.protocol
    adapters = functools.partial(
        CoLoRA,
        protocol.rank,
        protocol.alpha,
        num_blocks=protocol.num_blocks,
        exclude_modules=["projector"],
        private_layers=protocol.kept_layers is None,
        aligned=prepared.alignment,
        seed=seed,
        adapters_only_checkpoints=True,
    )
    ids = [client.id for client in prepared.clients]
    relations = {
        one: dict(zip(ids, row, strict=True)) for one, row in zip(ids, prepared.relations.tolist(), strict=True)
    }
    return {
        "adapters": adapters,
        "outputs": answer_outputs,
        "Graded": answer_losses,
        "batches": prepared.public,
        "logits": answer_logits,
        "tasks": {client.id: client.tasks for client in prepared.clients},
        "relations": relations,
    }


def last_checkpoint(folder: Path) -> Path | None:
    """Of the last whole round."""
    found = sorted(folder.glob("round-*.ckpt"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def versions() -> dict[str, str]:
    """Of what decides numbers."""
    names = ("lightning-pfl", "torch", "lightning", "transformers", "peft")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@final
@dataclass(frozen=True, eq=False)
class _Same:
    """A module made once, handed to all clients of its model."""

    module: VisionLanguageModule

    def __call__(self) -> VisionLanguageModule:
        return self.module


def _module(module: VisionLanguageModule, plan: MethodPlan) -> VisionLanguageModule:
    module = copy.deepcopy(module)
    module.lr = module.lr if plan.lr is None else plan.lr
    module.lr_pq = module.lr_pq if plan.lr_pq is None else plan.lr_pq
    return module


def _data(bench: Bench, client_id: str, seed: int) -> StreamDataModule:
    comparison = bench.comparison
    protocol, tasks = comparison.protocol, bench.prepared.train[client_id]
    sizes = [len(task) for task in tasks]
    if comparison.scenario == "dynamic":
        stream: Any = DynamicStream(sizes, protocol.rounds_per_task, seed=seed)
    else:
        stream = StaticStream(sizes, protocol.num_rounds, seed=seed)
    return StreamDataModule(
        tasks,
        stream,
        num_steps=protocol.steps,
        batch_size=protocol.batch_size,
        collate_fn=collate_for_client,
        seed=seed,
    )


def _costs(bench: Bench, method: Method, modules: Mapping[str, VisionLanguageModule]) -> dict[str, StepCost]:
    """Of one training pass and one sketch, by key of a model, on the first batch of one of its clients."""
    protocol, costs = bench.comparison.protocol, {}
    for client in bench.prepared.clients:
        if client.model in costs:
            continue
        task = bench.prepared.train[client.id][0]
        batch = collate_for_client([task[index] for index in range(protocol.batch_size)])
        module = copy.deepcopy(modules[client.model]).train()
        sketch = functools.partial(bench.prepared.probe.sketch, to_probe(batch))
        costs[client.model] = measured_cost(
            lambda module=module, batch=batch: answer_outputs(module, batch)[0],  # type: ignore[misc]
            probe=sketch if method.aggregator.needs_sketches else None,
            probe_every=protocol.probe_every,
        )
    return costs


def _operations(cost: StepCost, method: Method, steps: int) -> float:
    sketches = cost.of_round(steps) - steps * (cost.forward + cost.backward)
    return method.passes * steps * (cost.forward + cost.backward) + sketches


def _rows(matrix: torch.Tensor | None) -> Rows | None:
    """A matrix as JSON can hold it: NaN becomes None."""
    if matrix is None:
        return None
    return cast(Rows, [[value if value == value else None for value in row] for row in matrix.tolist()])
