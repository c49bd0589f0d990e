"""What the demo is made of: models, tasks and public captions, real ones from packages or tiny ones made here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from lightning_pfl.adapters.contrasts import shared_words
from lightning_pfl.benchmark.families import DOMAINS, build_tasks
from lightning_pfl.benchmark.features import EfficientNetTokens, FeatureStore
from lightning_pfl.benchmark.projector import load_projector
from lightning_pfl.benchmark.public import Caption, public_captions
from lightning_pfl.benchmark.tasks import Task
from lightning_pfl.benchmark.vlm import Projector
from lightning_pfl.benchmark.weights import load_language_model
from lightning_pfl.demo.plan import ModelPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Materials", "PackagedMaterials"]


class Materials(ABC):
    """Where the demo takes its models and tasks from."""

    @property
    @abstractmethod
    def store(self) -> FeatureStore:
        """Gives pictures' features."""

    @abstractmethod
    def language_model(self, plan: ModelPlan) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A frozen language model and its tokenizer."""

    @abstractmethod
    def projector(
        self,
        plan: ModelPlan,
        language_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        report: Callable[[int, int], None],
    ) -> Projector:
        """Its projector, pre-trained on public captions; ``report`` is told steps done and steps in all."""

    @abstractmethod
    def tasks(self, names: Sequence[str]) -> dict[str, Task]:
        """Tasks by name."""

    @abstractmethod
    def captions(self) -> Sequence[Caption]:
        """Public pictures with names, disjoint from every task."""

    @abstractmethod
    def words(self, tokenizers: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The same words in each vocabulary, by the tokenizers' keys."""


@final
class PackagedMaterials(Materials):
    """Real weights and pictures, fetched once from the registries that this machine is configured for."""

    def __init__(self) -> None:
        self._store: FeatureStore | None = None

    @property
    def store(self) -> FeatureStore:
        """Features of EfficientNet-Lite0, kept in the cache folder."""
        if self._store is None:
            self._store = FeatureStore(EfficientNetTokens())
        return self._store

    def language_model(self, plan: ModelPlan) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """From its package, converted once."""
        return load_language_model(plan.name, plan.num_layers)

    def projector(
        self,
        plan: ModelPlan,
        language_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        report: Callable[[int, int], None],
    ) -> Projector:
        """Trained once per model and depth, kept in the cache folder."""
        return load_projector(language_model, tokenizer, self.store, name=plan.name, report=report)

    def tasks(self, names: Sequence[str]) -> dict[str, Task]:
        """Of the families that the names begin with."""
        families = [family for family in DOMAINS if any(name.startswith(f"{family}-") for name in names)]
        built = {_short(task): task for task in build_tasks(families)}
        return {name: built[name] for name in names}

    def captions(self) -> Sequence[Caption]:
        """Emoji, drawings and photographs whose concepts no task uses."""
        return public_captions()

    def words(self, tokenizers: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Words that are one token everywhere."""
        return shared_words(tokenizers)


def _short(task: Task) -> str:
    """Family and domain, without a degree: what plans call a task."""
    return "-".join(task.name.split("-")[:2])
