"""One client's data: its own task to learn, everybody's tests to be measured on, and its task as the probe reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_pfl.benchmark.batches import TaskDataset, collate
from lightning_pfl.benchmark.vlm import VisionLanguageModule

__all__ = ["DemoData", "ProbeSet"]


@final
class DemoData(L.LightningDataModule):
    """Training and validation of one task, tests of all.

    Args:
        train: the client's training examples, for its own model.
        val: its validation examples.
        tests: one data set per task, in the order of the tables.
        probe: the training examples as the relevance probe reads them.
        batch_size: examples per training step; evaluation takes eight times as many.
    """

    def __init__(
        self, train: TaskDataset, val: TaskDataset, tests: Sequence[TaskDataset], probe: ProbeSet, *, batch_size: int
    ) -> None:
        super().__init__()
        self.train_set, self.val_set, self.test_sets, self.probe_set = train, val, tuple(tests), probe
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Shuffled batches of equal size."""
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True, collate_fn=collate)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches in order."""
        return DataLoader(self.val_set, 8 * self.batch_size, collate_fn=collate)

    def test_dataloader(self) -> list[DataLoader[dict[str, Tensor]]]:
        """One loader per task, in the order of the tables."""
        return [DataLoader(test, 8 * self.batch_size, collate_fn=collate) for test in self.test_sets]

    def probe_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Shuffled batches for the relevance probe."""
        return DataLoader(self.probe_set, self.batch_size, shuffle=True)


@final
class ProbeSet(Dataset[dict[str, Tensor]]):
    """A task as the probe's language model reads it: pictures and question as embeddings, the answer as a label.

    Args:
        module: the probe's own vision-language module; not kept.
        examples: tokenised for it.
    """

    def __init__(self, module: VisionLanguageModule, examples: TaskDataset) -> None:
        batch = collate([examples[index] for index in range(len(examples))])
        answers = batch["option_ids"].gather(1, batch["answer"][:, None])
        ids = torch.cat([batch["input_ids"], answers], dim=1)
        with torch.no_grad():
            self._embeddings = module.embed(batch["features"], ids)
        self._mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        self._labels = torch.full_like(ids, -100)
        self._labels[:, -1:] = answers

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "inputs_embeds": self._embeddings[index],
            "attention_mask": self._mask[index],
            "labels": self._labels[index],
        }
