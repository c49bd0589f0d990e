"""`Reader`: one language model of a comparison, and what it makes of examples before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, final

from torch import Tensor

from lightning_pfl.adapters.readings import Reading
from lightning_pfl.benchmark._compat import keep_last_layers
from lightning_pfl.benchmark.batches import TaskDataset
from lightning_pfl.benchmark.features import FeatureStore
from lightning_pfl.benchmark.state_cache import StateCache
from lightning_pfl.benchmark.states import LowerLayers, StateDataset
from lightning_pfl.benchmark.tasks import Example
from lightning_pfl.benchmark.vlm import VisionLanguageModule
from lightning_pfl.benchmark.vocabulary import KeptTokens
from lightning_pfl.comparison.data import Examples, collate_examples

__all__ = ["Reader"]


@final
class Reader:
    """A whole model, cut when everything below the layers that are kept has been run.

    Args:
        module: whole, without adapters.
        tokenizer: of its language model.
        store: gives pictures' features.
        kept_layers: how many last layers are trained; None: the whole model is run in every step.
        folder: for states.

    Attributes:
        digest: of the whole model's weights.
    """

    def __init__(
        self,
        module: VisionLanguageModule,
        tokenizer: Any,
        store: FeatureStore,
        *,
        kept_layers: int | None,
        folder: Path,
    ) -> None:
        self.module, self.tokenizer = module, tokenizer
        self.digest = LowerLayers(module, 1).digest()
        self._store, self._kept_layers = store, kept_layers
        self._lower = None if kept_layers is None else LowerLayers(module, kept_layers)
        self._cache = None if self._lower is None else StateCache(self._lower, folder=folder)
        self._below_last = StateCache(LowerLayers(module, 1), folder=folder) if kept_layers != 1 else self._cache
        self._kept: KeptTokens | None = None

    def tokenised(self, examples: Iterable[Example]) -> TaskDataset:
        """Examples as the model's tokenizer reads them."""
        return TaskDataset(tuple(examples), self.tokenizer, self._store)

    def keep_answers(self, sets: Iterable[TaskDataset]) -> None:
        """Only the answers that these offer are needed; data sets and module name them by their place from now on."""
        if self._lower is not None:
            self._kept = KeptTokens.of(row for examples in sets for row in examples.options)

    def examples(self, examples: TaskDataset, *, report: Callable[[int, int], None] | None = None) -> Examples:
        """Examples as the model that is trained reads them."""
        if self._cache is None:
            return examples
        assert self._kept is not None
        return self._cache.get(examples, report=report).with_options(self._kept.places)

    def last_layer(self, examples: TaskDataset, *, report: Callable[[int, int], None] | None = None) -> StateDataset:
        """Examples as the model's last layer reads them, answers by their token in the vocabulary."""
        assert self._below_last is not None
        return self._below_last.get(examples, report=report)

    def batches(self, examples: TaskDataset, batch_size: int) -> list[dict[str, Tensor]]:
        """All examples in order, as the model that is trained reads them."""
        seen = self.examples(examples)
        rows = [seen[index] for index in range(len(seen))]
        return [collate_examples(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]

    def reading(self, reading: Reading) -> Reading:
        """What the alignment reads, as the layers that are aligned see it."""
        return reading if self._lower is None else self._lower.reading(reading)

    def probe_model(self) -> Any:
        """A copy of the language model, cut to its last layer."""
        model = copy.deepcopy(self.module.language_model)
        keep_last_layers(model, 1)
        return model

    def cut(self) -> VisionLanguageModule:
        """The layers that are aligned and trained; nothing can be read afterwards. With its whole vocabulary."""
        return self.module if self._lower is None else self._lower.cut()

    def ready(self) -> VisionLanguageModule:
        """The module to train: cut, and with no more than the answers where states are kept."""
        module = self.cut()
        if self._kept is not None:
            self._kept.shrink(module.language_model)
            module.only_last_position = self._kept_layers == 1
        return module
