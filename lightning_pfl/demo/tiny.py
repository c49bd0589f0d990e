"""The demo in a minute: tiny random language models and drawn shapes, through the same code, nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from lightning_pfl.benchmark.features import FeatureStore
from lightning_pfl.benchmark.projector import pretrain_projector
from lightning_pfl.benchmark.public import Caption
from lightning_pfl.benchmark.tasks import Task
from lightning_pfl.benchmark.tiny import PixelTokens, shape_tasks, tiny_gemma, tiny_llama, tiny_tokenizer
from lightning_pfl.benchmark.vlm import Projector
from lightning_pfl.demo.materials import Materials
from lightning_pfl.demo.plan import ClientPlan, ModelPlan, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TinyMaterials", "quick_plan"]

_MODELS = {"tiny-llama": tiny_llama, "tiny-gemma": tiny_gemma}


def quick_plan() -> Plan:
    """Six clients on two tiny families, two kinds of question."""
    return Plan(
        models={
            "llama": ModelPlan("tiny-llama", num_layers=2, lr=1e-3, lr_pq=4e-2),
            "gemma": ModelPlan("tiny-gemma", num_layers=4, lr=1e-3, lr_pq=4e-2),
        },
        anchor="llama",
        clients=[
            ClientPlan("colour-255", "llama", "colour-255"),
            ClientPlan("colour-170", "gemma", "colour-170"),
            ClientPlan("colour-90", "llama", "colour-90"),
            ClientPlan("shape-255", "gemma", "shape-255"),
            ClientPlan("shape-170", "llama", "shape-170"),
            ClientPlan("shape-90", "gemma", "shape-90"),
        ],
        rounds=3,
        steps=8,
        num_train=32,
        num_val=16,
        num_test=48,
        rank=8,
        alpha=16,
        public_versions=1,
    )


@final
class TinyMaterials(Materials):
    """Random models and drawn shapes.

    Args:
        folder: where pictures and features are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._store = FeatureStore(PixelTokens(), folder=folder / "features")

    @property
    def store(self) -> FeatureStore:
        """Features of a fixed random encoder."""
        return self._store

    def language_model(self, plan: ModelPlan) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A random one of the family."""
        assert plan.num_layers is not None
        return _MODELS[plan.name](num_layers=plan.num_layers), tiny_tokenizer()

    def projector(
        self,
        plan: ModelPlan,
        language_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        report: Callable[[int, int], None],
    ) -> Projector:
        """Trained for a few steps."""
        captions = self.captions()
        return pretrain_projector(
            language_model, tokenizer, self._store, captions, num_steps=60, lr=5e-3, report=report
        )

    def tasks(self, names: Sequence[str]) -> dict[str, Task]:
        """Which colour, which shape, on three backgrounds."""
        built = {task.name: task for task in shape_tasks(self._folder / "tasks", num_examples=96)}
        return {name: built[name] for name in names}

    def captions(self) -> Sequence[Caption]:
        """Shapes of their own, named by colour or by shape."""
        public = shape_tasks(self._folder / "public", backgrounds=(200, 120), num_examples=72, seed=1)
        return [Caption(example.images[0], example.answer) for task in public for example in task.train]

    def words(self, tokenizers: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """All words: both models have one tokenizer."""
        return {key: torch.arange(len(tokenizer.get_vocab())) for key, tokenizer in tokenizers.items()}
