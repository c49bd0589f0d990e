"""What every method of the demo starts from: tasks, cut models, their alignment, the probe. Made once.

Start at `prepare`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_pfl.adapters import CoLoraConfig
from lightning_pfl.adapters.alignment import Alignment
from lightning_pfl.benchmark.batches import TaskDataset
from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.public import varied
from lightning_pfl.benchmark.states import LowerLayers, StateDataset
from lightning_pfl.benchmark.tasks import Example, Task
from lightning_pfl.benchmark.vlm import VisionLanguageModule
from lightning_pfl.demo.alignment import align_on_pictures, picture_readings
from lightning_pfl.demo.data import DemoData, ProbeSet
from lightning_pfl.demo.materials import Materials
from lightning_pfl.demo.plan import Plan
from lightning_pfl.demo.progress import DemoProgress
from lightning_pfl.relevance import CausalLMProbe

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True, eq=False)
class Prepared:
    """What methods share.

    Attributes:
        tasks: by name, cut to the plan's sizes.
        modules: by key of a model, cut to the last layer, without adapters; to be copied, not changed.
        data: by client id.
        alignment: of the models.
        probe: of the clients' tasks.
    """

    tasks: Mapping[str, Task]
    modules: Mapping[str, VisionLanguageModule]
    data: Mapping[str, DemoData]
    alignment: Alignment
    probe: CausalLMProbe


def prepare(plan: Plan, materials: Materials, progress: DemoProgress) -> Prepared:
    """Read pictures and models, run what is frozen once, align the models.

    Args:
        plan: what will be run.
        materials: models, tasks, captions.
        progress: told of what is being done.
    """
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
        module = VisionLanguageModule(language_model, projector, lr=model.lr, lr_pq=model.lr_pq)
        lower[key] = LowerLayers(module, num_kept=1)
    progress.stage("what the frozen lower layers make of every example, once")
    data = _data_of(plan, tasks, tokenizers, lower, materials)
    readings = picture_readings(tokenizers, materials.store, public, materials.words(tokenizers))
    for index, record in enumerate(readings):
        readings[index] = {key: lower[key].reading(reading) for key, reading in record.items()}
        progress.count(index + 1, len(readings))
    modules = {key: layers.cut() for key, layers in lower.items()}
    probe = CausalLMProbe(modules[plan.anchor].language_model)
    probe.prepare()

    progress.stage("aligning the models on public pictures")
    config = CoLoraConfig(
        r=plan.rank, alpha=plan.alpha, num_blocks=1, exclude_modules=["projector"], private_layers=False
    )
    copies = {key: copy.deepcopy(module) for key, module in modules.items()}
    alignment = align_on_pictures(copies, readings, anchor=plan.anchor, config=config)
    return Prepared(tasks, modules, data, alignment, probe)


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
