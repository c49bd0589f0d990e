"""Tasks as states before the last layer of both models, and the bases of several alignments; made once, kept in files.

Models, projectors, tasks and public pictures are the demo's, at full depth. Start at `prepare`, then `load`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_pfl.adapters import CoLoraConfig, inject
from lightning_pfl.adapters.alignment import Canonical, CcaB, GradientB, LeastSquares, align
from lightning_pfl.adapters.injection import config_of
from lightning_pfl.adapters.tensors import bases_of
from lightning_pfl.benchmark.batches import TaskDataset
from lightning_pfl.benchmark.packages import cache_dir
from lightning_pfl.benchmark.public import varied
from lightning_pfl.benchmark.states import LowerLayers, StateDataset
from lightning_pfl.benchmark.vlm import VisionLanguageModule
from lightning_pfl.benchmark.weights import GEMMA3_270M, SMOLLM2_135M
from lightning_pfl.demo.alignment import _prefers, picture_readings
from lightning_pfl.demo.data import ProbeSet
from lightning_pfl.demo.materials import PackagedMaterials
from lightning_pfl.demo.plan import ModelPlan
from lightning_pfl.relevance import CausalLMProbe

from .block import Block, Prefix

MODELS = {"smollm2": SMOLLM2_135M, "gemma3": GEMMA3_270M}
ANCHOR = "smollm2"
FAMILIES = {
    "kind": ("art4apps", "fluent", "google", "twitter"),
    "defect": ("photo", "art4apps", "openclipart", "fluent"),
    "place": ("photo", "art4apps", "fluent", "google"),
    "count": ("photo", "art4apps", "fluent", "google"),
    "shape": ("photo", "art4apps", "fluent", "google"),
}
TASKS = tuple(f"{family}-{domain}" for family, domains in FAMILIES.items() for domain in domains)
SIZES = {"train": 128, "val": 100, "test": 200}
ALPHA_PER_RANK = 2.0
RULES = {
    "canonical": (16, Canonical()),
    "canonical, no weights": (16, Canonical(power=0)),
    "canonical, rank 32": (32, Canonical()),
    "least squares, gradient B": (16, LeastSquares(GradientB())),
    "paper": (16, LeastSquares(CcaB(), orthonormal_only=True)),
}
UNALIGNED = "unaligned"
"""Random orthonormal bases, as the models draw them themselves."""


@dataclass(frozen=True, eq=False)
class Materials:
    """Everything the engine reads.

    Attributes:
        blocks: per model.
        tasks: per model and task, per side of the split.
        sketches: per task, each training example's gradient in the frozen anchor, sketched ``[n, k]``.
    """

    blocks: Mapping[str, Block]
    tasks: Mapping[str, Mapping[str, Mapping[str, Prefix]]]
    sketches: Mapping[str, Tensor]


def folder() -> Path:
    """Where files lie."""
    return cache_dir() / "variants"


def prepare(sides: Sequence[str]) -> None:
    """Run what is frozen, once: states of every task in both models, sketches, alignments. Goes on where it was.

    Args:
        sides: of the split; training is always among them.
    """
    at = folder()
    at.mkdir(parents=True, exist_ok=True)
    packaged = PackagedMaterials()
    tasks = packaged.tasks(TASKS)
    public = varied(packaged.captions(), 2, seed=0)
    cut = {
        side: {name: getattr(task, side)[:size] for name, task in tasks.items()}
        for side, size in SIZES.items()
        if side in {"train", *sides}
    }
    packaged.store.tokens(
        [view for side in cut.values() for examples in side.values() for one in examples for view in one.images]
        + [caption.view for caption in public]
    )
    tokenizers, lower = {}, {}
    for key, name in MODELS.items():
        plan = ModelPlan(name, num_layers=None, lr=1.0, lr_pq=1.0)
        model, tokenizers[key] = packaged.language_model(plan)
        projector = packaged.projector(plan, model, tokenizers[key], report=lambda *_: None)
        lower[key] = LowerLayers(VisionLanguageModule(model, projector), num_kept=1)
        for side, task in itertools.product(cut, TASKS):
            if not (file := at / f"{key}-{task}-{side}.pt").exists():
                made = StateDataset(TaskDataset(cut[side][task], tokenizers[key], packaged.store), lower[key])
                _save(_stacked(made), file)
                if (key, side) == (ANCHOR, "train"):
                    torch.save(made, at / f"probe-{task}.pt")
                print(key, task, side, flush=True)
    readings = [
        {key: lower[key].reading(reading) for key, reading in record.items()}
        for record in picture_readings(tokenizers, packaged.store, public, packaged.words(tokenizers))
    ]
    modules = {key: layers.cut() for key, layers in lower.items()}
    probe = CausalLMProbe(modules[ANCHOR].language_model)
    probe.prepare()
    for task in TASKS:
        if not (file := at / f"sketch-{task}.pt").exists():
            examples = ProbeSet(torch.load(at / f"probe-{task}.pt", weights_only=False))
            rows = [examples[index] for index in range(len(examples))]
            batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            _save(probe.sketches(batch), file)
    for name, (rank, rule) in {**RULES, UNALIGNED: (16, None)}.items():
        if (file := at / f"bases-{name}.pt").exists():
            continue
        config = CoLoraConfig(
            r=rank, alpha=ALPHA_PER_RANK * rank, num_blocks=1, exclude_modules=["projector"], private_layers=False
        )
        adapted = {key: copy.deepcopy(module) for key, module in modules.items()}
        for module in adapted.values():
            inject(module, config)
        if rule is None:
            bases = {key: bases_of(module) for key, module in adapted.items()}
        else:
            alignment = align(adapted, readings, anchor=ANCHOR, loss=_prefers, rule=rule)
            print(name, alignment.table(), sep="\n", flush=True)
            bases = {key: alignment.bases[config_of(module).base_identity] for key, module in adapted.items()}
        _save(
            {key: {where.split("/")[-1]: pair for where, pair in layers.items()} for key, layers in bases.items()}, file
        )


def load(alignment: str, side: str) -> Materials:
    """What `prepare` made for training and one other side, under one of its alignments."""
    at, packaged = folder(), PackagedMaterials()
    bases = torch.load(at / f"bases-{alignment}.pt")
    blocks, tasks = {}, {}
    for key, name in MODELS.items():
        model, _ = packaged.language_model(ModelPlan(name, num_layers=None, lr=1.0, lr_pq=1.0))
        blocks[key] = Block(model, bases[key], ALPHA_PER_RANK)
        tasks[key] = {
            task: {part: blocks[key].prefix(*torch.load(at / f"{key}-{task}-{part}.pt")) for part in ("train", side)}
            for task in TASKS
        }
    return Materials(blocks, tasks, {task: torch.load(at / f"sketch-{task}.pt") for task in TASKS})


def _stacked(data: StateDataset) -> tuple[Tensor, Tensor, Tensor]:
    """States ``[n, t, d]``, answer tokens ``[c]``, right ones ``[n]``; one task asks one question."""
    rows: Sequence[dict[str, Tensor]] = [data[index] for index in range(len(data))]
    assert all(torch.equal(row["option_ids"], rows[0]["option_ids"]) for row in rows)
    return (
        torch.stack([row["states"] for row in rows]),
        rows[0]["option_ids"],
        torch.stack([row["answer"] for row in rows]),
    )


def _save(what: object, file: Path) -> None:
    partial = file.with_suffix(".part")
    torch.save(what, partial)
    partial.replace(file)
