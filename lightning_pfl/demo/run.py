"""The demo itself: make models meet, train every method for the same steps, measure every client on every task."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from transformers.utils import logging as transformers_logging

from lightning_pfl.aggregation import Aggregator, LocalOnly, RelevanceAggregator
from lightning_pfl.benchmark.tasks import Task
from lightning_pfl.benchmark.vlm import VisionLanguageModule
from lightning_pfl.callbacks.colora import CoLoRA
from lightning_pfl.callbacks.relevance_probe import RelevanceProbe
from lightning_pfl.demo.data import DemoData
from lightning_pfl.demo.materials import Materials
from lightning_pfl.demo.plan import Plan
from lightning_pfl.demo.preparation import Prepared, prepare
from lightning_pfl.demo.progress import DemoProgress
from lightning_pfl.demo.scores import Count, Scores
from lightning_pfl.federation import Client, FederatedStrategy
from lightning_pfl.federation.pools import ClientPool

__all__ = ["DemoResult", "Method", "methods", "quiet", "run_demo", "train"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """A way to train the clients.

    Attributes:
        name: as in the tables.
        aggregator: the server's rule.
    """

    name: str
    aggregator: Aggregator


@dataclass(frozen=True, eq=False)
class DemoResult:
    """What came out.

    Attributes:
        tasks: by name.
        scores: per method, in the order in which they ran.
        strategy: of the last method, which exchanged: relevance, traffic, adapters.
    """

    tasks: Mapping[str, Task]
    scores: Sequence[Scores]
    strategy: FederatedStrategy


@final
@dataclass(frozen=True, eq=False)
class _Built:
    """A module made once, handed to all clients of its model."""

    module: VisionLanguageModule

    def __call__(self) -> VisionLanguageModule:
        return self.module


def methods() -> tuple[Method, ...]:
    """Local training, then ours."""
    return Method("local only", LocalOnly()), Method("ours", RelevanceAggregator())


def run_demo(
    plan: Plan, materials: Materials, output: Path, *, pool: Callable[[], ClientPool], progress: DemoProgress
) -> DemoResult:
    """Run every method on the same models, data and steps.

    Args:
        plan: what to run.
        materials: models, tasks, captions.
        output: folder for logs; made if it is not there.
        pool: makes the place where clients run, once per method.
        progress: told of what is being done.

    Returns:
        The scores and the strategy that exchanged.
    """
    with quiet():
        prepared = prepare(plan, materials, progress)
        scores, strategy = [], None
        for method in methods():
            progress.stage(f"{method.name}: {plan.rounds} rounds of {plan.steps} steps for {len(plan.clients)} clients")
            strategy, found = train(plan, method, prepared, output, pool())
            scores.append(found)
    assert strategy is not None
    return DemoResult(prepared.tasks, scores, strategy)


def train(
    plan: Plan, method: Method, prepared: Prepared, output: Path, pool: ClientPool
) -> tuple[FederatedStrategy, Scores]:
    """Train all clients by one method and test every client on every task.

    Args:
        plan: what to run.
        method: how.
        prepared: from `prepare`, for the same plan.
        output: folder for logs.
        pool: where clients run.
    """
    data = prepared.data
    L.seed_everything(plan.seed, verbose=False)
    modules = {key: copy.deepcopy(module) for key, module in prepared.modules.items()}
    sources = {key: _Built(module) for key, module in modules.items()}
    strategy = FederatedStrategy(
        clients=[Client(client.id, model=sources[client.model], datamodule=data[client.id]) for client in plan.clients],
        aggregator=method.aggregator,
        pool=pool,
        local_steps=plan.steps,
        seed=plan.seed,
    )
    callbacks: list[L.Callback] = [
        CoLoRA(
            plan.rank,
            plan.alpha,
            num_blocks=1,
            exclude_modules=["projector"],
            private_layers=False,
            aligned=prepared.alignment,
            seed=plan.seed,
        )
    ]
    if method.aggregator.needs_sketches:
        callbacks.append(RelevanceProbe(prepared.probe, every_n_steps=4))
    trainer = L.Trainer(
        max_epochs=plan.rounds,
        accelerator="cpu",
        callbacks=callbacks,
        strategy=strategy,
        logger=CSVLogger(output / "logs", name=method.name.replace(" ", "-")),
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(modules[plan.anchor], data[plan.clients[0].id])
    trainer.test(modules[plan.anchor], data[plan.clients[0].id], verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return strategy, _scores(plan, method, metrics, data, list(prepared.tasks))


def _scores(
    plan: Plan, method: Method, metrics: Mapping[str, float], data: Mapping[str, DemoData], task_names: Sequence[str]
) -> Scores:
    counts = {}
    for client in plan.clients:
        counts[client.id] = {
            name: Count(round(metrics[f"client/{client.id}/test_acc/dataloader_idx_{index}"] * len(test)), len(test))
            for index, (name, test) in enumerate(zip(task_names, data[client.id].test_sets, strict=True))
        }
    return Scores(method.name, counts, {client.id: client.task for client in plan.clients})


@contextmanager
def quiet() -> Iterator[None]:
    """Without remarks on hardware and on loading; Lightning's progress bar stays."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with_bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*(LeafSpec|in eval mode|many workers|logging interval).*")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if with_bars:
            transformers_logging.enable_progress_bar()
