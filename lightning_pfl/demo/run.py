"""The demo itself: make models meet, train every method for the same steps, measure every client on every task."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from transformers.utils import logging as transformers_logging

from lightning_pfl.adapters import CoLoraConfig
from lightning_pfl.adapters.alignment import Alignment
from lightning_pfl.aggregation import Aggregator, LocalOnly, RelevanceAggregator
from lightning_pfl.benchmark.batches import TaskDataset
from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.public import varied
from lightning_pfl.benchmark.states import LowerLayers, StateDataset
from lightning_pfl.benchmark.tasks import Example, Task
from lightning_pfl.benchmark.vlm import VisionLanguageModule
from lightning_pfl.callbacks.colora import CoLoRA
from lightning_pfl.callbacks.relevance_probe import RelevanceProbe
from lightning_pfl.demo.alignment import align_on_pictures, picture_readings
from lightning_pfl.demo.data import DemoData, ProbeSet
from lightning_pfl.demo.materials import Materials
from lightning_pfl.demo.plan import Plan
from lightning_pfl.demo.progress import DemoProgress
from lightning_pfl.demo.scores import Count, Scores
from lightning_pfl.federation import Client, FederatedStrategy
from lightning_pfl.federation.pools import ClientPool
from lightning_pfl.relevance import CausalLMProbe

__all__ = ["DemoResult", "Method", "run_demo"]

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
    with _quiet():
        return _run(plan, materials, output, pool, progress)


def _run(
    plan: Plan, materials: Materials, output: Path, pool: Callable[[], ClientPool], progress: DemoProgress
) -> DemoResult:
    progress.stage("pictures and their features")
    tasks = {name: _cut(task, plan) for name, task in materials.tasks([client.task for client in plan.clients]).items()}
    public = varied(materials.captions(), plan.public_versions, seed=plan.seed)
    views = [*(view for task in tasks.values() for view in _views(task)), *(caption.view for caption in public)]
    materials.store.tokens(views, report=progress.count)
    tokenizers, lower = {}, {}
    for key, model in plan.models.items():
        progress.stage(f"{model.name} and its projector, pre-trained once on public captions")
        language_model, tokenizers[key] = materials.language_model(model)
        projector = materials.projector(model, language_model, tokenizers[key], report=progress.count)
        lower[key] = LowerLayers(VisionLanguageModule(language_model, projector, lr=model.lr), num_kept=1)
    progress.stage("what the frozen lower layers make of every example, once")
    data = _data_of(plan, tasks, tokenizers, lower, materials)
    readings = picture_readings(tokenizers, materials.store, public, materials.words(tokenizers))
    for index, record in enumerate(readings):
        readings[index] = {key: lower[key].reading(reading) for key, reading in record.items()}
        progress.count(index + 1, len(readings))
    pristine = {key: layers.cut() for key, layers in lower.items()}
    probe = CausalLMProbe(pristine[plan.anchor].language_model)
    probe.prepare()

    progress.stage("aligning the models on public pictures")
    config = CoLoraConfig(
        r=plan.rank, alpha=plan.alpha, num_blocks=1, exclude_modules=["projector"], private_layers=False
    )
    alignment = align_on_pictures(
        {key: _copy(module) for key, module in pristine.items()}, readings, anchor=plan.anchor, config=config
    )
    scores, strategy = [], None
    for method in methods():
        progress.stage(f"{method.name}: {plan.rounds} rounds of {plan.steps} steps for {len(plan.clients)} clients")
        strategy, found = _train(plan, method, alignment, pristine, data, probe, output, pool(), list(tasks))
        scores.append(found)
    assert strategy is not None
    return DemoResult(tasks, scores, strategy)


def _train(
    plan: Plan,
    method: Method,
    alignment: Alignment,
    pristine: Mapping[str, VisionLanguageModule],
    data: Mapping[str, DemoData],
    probe: CausalLMProbe,
    output: Path,
    pool: ClientPool,
    task_names: Sequence[str],
) -> tuple[FederatedStrategy, Scores]:
    L.seed_everything(plan.seed, verbose=False)
    modules = {key: _copy(module) for key, module in pristine.items()}
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
            aligned=alignment,
            seed=plan.seed,
        )
    ]
    if method.aggregator.needs_sketches:
        callbacks.append(RelevanceProbe(probe, every_n_steps=4))
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
    return strategy, _scores(plan, method, metrics, data, task_names)


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


def _data_of(
    plan: Plan,
    tasks: Mapping[str, Task],
    tokenizers: Mapping[str, Any],
    lower: Mapping[str, LowerLayers],
    materials: Materials,
) -> dict[str, DemoData]:
    """Each client's data; the tests are read once per model."""

    def states(examples: Sequence[Example], key: str) -> StateDataset:
        return StateDataset(TaskDataset(examples, tokenizers[key], materials.store), lower[key])

    tests = {key: [states(task.test, key) for task in tasks.values()] for key in plan.models}
    return {
        client.id: DemoData(
            train := states(tasks[client.task].train, client.model),
            states(tasks[client.task].val, client.model),
            tests[client.model],
            ProbeSet(train if client.model == plan.anchor else states(tasks[client.task].train, plan.anchor)),
            batch_size=plan.batch_size,
        )
        for client in plan.clients
    }


def _views(task: Task) -> Iterator[View]:
    for example in (*task.train, *task.val, *task.test):
        yield from example.images


def _cut(task: Task, plan: Plan) -> Task:
    return Task(
        task.name,
        task.family,
        task.train[: plan.num_train],
        task.val[: plan.num_val],
        task.test[: plan.num_test],
        task.licences,
    )


def _copy(module: VisionLanguageModule) -> VisionLanguageModule:
    """A module of its own that shares nothing; adapters can be injected into it."""
    return copy.deepcopy(module)


@contextmanager
def _quiet() -> Iterator[None]:
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
