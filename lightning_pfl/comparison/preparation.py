"""What all runs of a comparison share: clients and tasks, states of frozen layers, the alignment, the probe. Made once.

Start at `prepare`. All that costs anything is kept in the cache folder under a digest of whatever decides it (weights,
pictures' features, tokens), so that the next process only reads it.
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from filelock import FileLock
from torch import Tensor

from lightning_pfl.adapters import CoLoraConfig
from lightning_pfl.adapters.aligned import Alignment
from lightning_pfl.benchmark.packages import cache_dir
from lightning_pfl.benchmark.public import Caption, varied
from lightning_pfl.benchmark.states import StateDataset
from lightning_pfl.benchmark.suite.recipes import Sizes
from lightning_pfl.benchmark.tasks import Task
from lightning_pfl.benchmark.vlm import VisionLanguageModule
from lightning_pfl.comparison.data import ClientExamples, Examples, PublicSet
from lightning_pfl.comparison.plan import Comparison
from lightning_pfl.comparison.public import public_examples
from lightning_pfl.comparison.reading import Reader
from lightning_pfl.comparison.world import World
from lightning_pfl.demo.alignment import align_on_pictures, picture_readings
from lightning_pfl.demo.plan import ModelPlan
from lightning_pfl.demo.progress import DemoProgress
from lightning_pfl.relevance import CausalLMProbe

__all__ = ["ClientTasks", "Prepared", "Unseen", "clients_of", "prepare", "relations_of"]

_ALIGNMENT = "alignment-1"  # changes with how models are aligned here


@dataclass(frozen=True)
class ClientTasks:
    """One client.

    Attributes:
        id: as in tables.
        model: key of its language model.
        tasks: names, in the order of time.
    """

    id: str
    model: str
    tasks: Sequence[str]


@final
@dataclass(frozen=True, eq=False)
class Unseen:
    """A task that no client has, as one model reads it.

    Attributes:
        task: its name.
        model: key of the language model.
        chance: accuracy of answering without looking.
        train: what a newcomer has to train on.
        questions: what it is asked.
    """

    task: str
    model: str
    chance: float
    train: ClientExamples
    questions: Examples


@final
@dataclass(frozen=True, eq=False)
class Prepared:
    """What runs share.

    Attributes:
        clients: in the order of tables.
        chance: accuracy of answering without looking, by task, in the order of tables.
        modules: by key of a model, without adapters; to be copied, not changed.
        train: by client id, one data set per task in the order of time.
        questions: by key of a model, one data set per task, `num_self` questions each.
        probed: the same questions as the probe's last layer reads them, one data set per task.
        probe: of the clients' tasks.
        alignment: of the models; None where there is only one.
        public: public pictures for distillation.
        relations: how related clients are in truth, ``[N, N]``; see `relations_of`.
        unseen: tasks for newcomers, each as every model that a client has reads it.
    """

    clients: Sequence[ClientTasks]
    chance: Mapping[str, float]
    modules: Mapping[str, VisionLanguageModule]
    train: Mapping[str, Sequence[ClientExamples]]
    questions: Mapping[str, Sequence[Examples]]
    probed: Sequence[StateDataset]
    probe: CausalLMProbe
    alignment: Alignment | None
    public: PublicSet
    relations: Tensor
    unseen: Sequence[Unseen] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """All names, in the order of tables."""
        return tuple(self.chance)


def prepare(comparison: Comparison, world: World, progress: DemoProgress, *, cache: Path | None = None) -> Prepared:
    """Read or make everything.

    Args:
        comparison: what will be run.
        world: clients, tasks, models.
        progress: told of what is being done.
        cache: cache folder; `cache_dir()` by default.
    """
    protocol = comparison.protocol
    clients = clients_of(comparison, world)
    names = list(dict.fromkeys(name for client in clients for name in client.tasks))
    if known := sorted(set(comparison.newcomers) & set(names)):
        raise ValueError(f"`newcomers` must name tasks that no client has, but some have {known}.")
    progress.stage(f"{len(names)} tasks of {len(clients)} clients, and their pictures' features")
    tasks: dict[str, Task] = {}
    for name in (*names, *comparison.newcomers):
        tasks[name] = _built(comparison, world, name)
        views = [view for example in (*tasks[name].train, *tasks[name].test) for view in example.images]
        world.materials.store.tokens(views)
        progress.count(len(tasks), len(names) + len(comparison.newcomers))
    captions = varied(world.materials.captions(), protocol.public_versions)
    keys = list(dict.fromkeys([protocol.anchor, *(client.model for client in clients), *comparison.aligned_with]))
    readers = {key: _reader(comparison, world, key, progress, cache or cache_dir()) for key in keys}
    public = public_examples(captions, {key: one.tokenizer for key, one in readers.items()}, protocol.num_public)

    train = {key: {name: one.tokenised(task.train) for name, task in tasks.items()} for key, one in readers.items()}
    asked = {key: {name: one.tokenised(task.test) for name, task in tasks.items()} for key, one in readers.items()}
    shown = {key: one.tokenised(public) for key, one in readers.items()}
    for key, reader in readers.items():
        reader.keep_answers([*train[key].values(), *asked[key].values(), shown[key]])
    anchor = readers[protocol.anchor]
    used = list(dict.fromkeys(client.model for client in clients))
    arriving = [(key, name) for name in comparison.newcomers for key in used]
    own = list(dict.fromkeys((client.model, name) for client in clients for name in client.tasks))
    progress.stage("what the frozen layers make of every example, once")
    examples: dict[tuple[str, str], ClientExamples] = {}
    for key, name in (*own, *arriving):
        read = readers[key].examples(train[key][name], report=progress.count)
        probed = anchor.last_layer(train[protocol.anchor][name], report=progress.count)
        examples[key, name] = ClientExamples(read, probed)
    questions: dict[str, list[Examples]] = {}
    for key in used:
        questions[key] = [readers[key].examples(asked[key][name], report=progress.count) for name in names]
    unseen = []
    for key, name in arriving:
        seen = readers[key].examples(asked[key][name], report=progress.count)
        unseen.append(Unseen(name, key, world.chance(tasks[name]), examples[key, name], seen))
    batches = {
        one.module.projector.hidden: one.batches(shown[key], protocol.batch_size) for key, one in readers.items()
    }
    probe = CausalLMProbe(anchor.probe_model())
    probe.prepare()
    alignment = None
    if len(readers) > 1:
        alignment = _aligned(comparison, readers, captions, world, progress, cache or cache_dir())
    return Prepared(
        clients=clients,
        chance={name: world.chance(tasks[name]) for name in names},
        modules={key: reader.ready() for key, reader in readers.items()},
        train={client.id: [examples[client.model, name] for name in client.tasks] for client in clients},
        questions=questions,
        probed=[anchor.last_layer(asked[protocol.anchor][name], report=progress.count) for name in names],
        probe=probe,
        alignment=alignment,
        public=PublicSet(batches),
        relations=relations_of(clients, world),
        unseen=unseen,
    )


def clients_of(comparison: Comparison, world: World) -> tuple[ClientTasks, ...]:
    """The clients that a comparison uses, with their models and tasks.

    Raises:
        ValueError: a time or a number of clients that the world does not have.
    """
    protocol = comparison.protocol
    there = world.clients() if protocol.clients is None else protocol.clients
    count = len(there) if protocol.num_clients is None else protocol.num_clients
    most = min(len(tasks) for tasks in there.values())
    if not 1 < count <= len(there) or not protocol.times or not set(protocol.times) <= set(range(most)):
        raise ValueError(
            f"There are {len(there)} clients with {most} tasks in time, but the protocol asks for {count} clients at "
            f"the times {list(protocol.times)}."
        )
    models = comparison.assignment
    return tuple(
        ClientTasks(client, models[place % len(models)], tuple(tasks[time] for time in protocol.times))
        for place, (client, tasks) in enumerate(list(there.items())[:count])
    )


def relations_of(clients: Sequence[ClientTasks], world: World) -> Tensor:
    """How related clients are in truth: the mean over pairs of their tasks, ``[N, N]``; the diagonal is left 0."""
    names = list(dict.fromkeys(name for client in clients for name in client.tasks))
    between = torch.tensor(world.relatedness(names), dtype=torch.float64)
    rows = [torch.tensor([names.index(name) for name in client.tasks]) for client in clients]
    found = torch.tensor([[float(between[one][:, two].mean()) for two in rows] for one in rows], dtype=torch.float64)
    return found.fill_diagonal_(0.0)


def _built(comparison: Comparison, world: World, name: str) -> Task:
    """A task whose test side is the side that is asked about."""
    protocol, on_val = comparison.protocol, comparison.side == "val"
    sizes = Sizes(protocol.num_train, protocol.num_val if on_val else 1, 1 if on_val else protocol.num_self)
    task = world.task(name, sizes)
    test = task.val if on_val else task.test
    return Task(task.name, task.family, task.train, task.val, test, task.licences)


def _reader(comparison: Comparison, world: World, key: str, progress: DemoProgress, cache: Path) -> Reader:
    language = comparison.protocol.models[key]
    plan = ModelPlan(language.name, language.num_layers, language.lr, language.lr_pq)
    progress.stage(f"{language.name} and its projector, pre-trained once on public captions")
    model, tokenizer = world.materials.language_model(plan)
    projector = world.materials.projector(plan, model, tokenizer, report=progress.count)
    module = VisionLanguageModule(model, projector, lr=plan.lr, lr_pq=plan.lr_pq)
    store, kept = world.materials.store, comparison.protocol.kept_layers
    return Reader(module, tokenizer, store, kept_layers=kept, folder=cache / "states")


def _aligned(
    comparison: Comparison,
    readers: Mapping[str, Reader],
    captions: Sequence[Caption],
    world: World,
    progress: DemoProgress,
    cache: Path,
) -> Alignment:
    """From disk, or made; afterwards the readers' modules are cut."""
    protocol = comparison.protocol
    config = CoLoraConfig(
        r=protocol.rank,
        alpha=protocol.alpha,
        num_blocks=protocol.num_blocks,
        exclude_modules=["projector"],
        private_layers=protocol.kept_layers is None,
    )
    about: list[object] = [
        _ALIGNMENT,
        protocol.anchor,
        protocol.kept_layers,
        protocol.public_versions,
        len(captions),
        config.to_dict(),
    ]
    rule = None if comparison.alignment is None else comparison.alignment()
    about += [] if rule is None else [repr(rule)]
    about += [(key, reader.digest) for key, reader in sorted(readers.items())]
    folder = cache / "alignments" / hashlib.sha256(repr(about).encode()).hexdigest()[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            progress.stage("aligning the models on public pictures, once")
            tokenizers = {key: reader.tokenizer for key, reader in readers.items()}
            words = world.materials.words(tokenizers)
            readings = picture_readings(tokenizers, world.materials.store, captions, words)
            for index, record in enumerate(readings):
                readings[index] = {key: readers[key].reading(reading) for key, reading in record.items()}
                progress.count(index + 1, len(readings))
            copies = {key: copy.deepcopy(reader.cut()) for key, reader in readers.items()}
            made = align_on_pictures(copies, readings, anchor=protocol.anchor, config=config, rule=rule)
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            made.save(partial)
            os.replace(partial, folder)
    return Alignment.load(folder)
