"""What every method of the demo starts from: tasks, cut models, their alignment, the probe. Made once.

Start at `prepare`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lightning_pfl.adapters import CoLoraConfig
from lightning_pfl.adapters.alignment import Alignment
from lightning_pfl.adapters.readings import Reading
from lightning_pfl.benchmark.batches import TaskDataset
from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.public import varied
from lightning_pfl.benchmark.states import LowerLayers, StateDataset
from lightning_pfl.benchmark.tasks import Example, Task
from lightning_pfl.benchmark.vlm import VisionLanguageModule
from lightning_pfl.demo.alignment import align_on_pictures, picture_readings
from lightning_pfl.demo.data import DemoData, ProbeSet
from lightning_pfl.demo.materials import Materials
from lightning_pfl.demo.plan import ClientPlan, Plan
from lightning_pfl.demo.progress import DemoProgress
from lightning_pfl.demo.side_by_side import Report, side_by_side
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
    names = " and ".join(model.name for model in plan.models.values())
    progress.stage(f"{names}, and their projectors, pre-trained once on public captions")
    loaded = {key: materials.language_model(model) for key, model in plan.models.items()}
    tokenizers = {key: tokenizer for key, (_, tokenizer) in loaded.items()}

    def lower_layers(key: str, report: Report) -> LowerLayers:
        model, (language_model, tokenizer) = plan.models[key], loaded[key]
        projector = materials.projector(model, language_model, tokenizer, report=report)
        return LowerLayers(VisionLanguageModule(language_model, projector, lr=model.lr, lr_pq=model.lr_pq), num_kept=1)

    lower = side_by_side({key: functools.partial(lower_layers, key) for key in plan.models}, progress.count)
    progress.stage("what the frozen lower layers make of every example, once")
    asked = picture_readings(tokenizers, materials.store, public, materials.words(tokenizers))

    def frozen(key: str, report: Report) -> tuple[_States, list[Reading]]:
        def states(examples: Sequence[Example]) -> StateDataset:
            return StateDataset(TaskDataset(examples, tokenizers[key], materials.store), lower[key])

        own = [client.task for client in plan.clients if client.model == key]
        trained = list(tasks) if key == plan.anchor else own  # the probe reads every task
        found = _States(
            {name: states(tasks[name].train) for name in trained},
            {name: states(tasks[name].val) for name in own},
            [states(task.test) for task in tasks.values()],
        )
        readings = []
        for record in asked:
            readings.append(lower[key].reading(record[key]))
            report(len(readings), len(asked))
        return found, readings

    done = side_by_side({key: functools.partial(frozen, key) for key in plan.models}, progress.count)
    readings = [{key: done[key][1][index] for key in plan.models} for index in range(len(asked))]
    data = {
        client.id: _data(client, plan, {key: states for key, (states, _) in done.items()}) for client in plan.clients
    }
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


@dataclass(frozen=True, eq=False)
class _States:
    """What one model's lower layers make of the tasks: training and validation by task, the tests of all in order."""

    train: Mapping[str, StateDataset]
    val: Mapping[str, StateDataset]
    tests: Sequence[StateDataset]


def _data(client: ClientPlan, plan: Plan, states: Mapping[str, _States]) -> DemoData:
    own = states[client.model]
    return DemoData(
        own.train[client.task],
        own.val[client.task],
        own.tests,
        ProbeSet(states[plan.anchor].train[client.task]),
        batch_size=plan.batch_size,
    )


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
