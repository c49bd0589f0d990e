"""One client's data: its own task to learn, everybody's tests to be measured on, and its task as the probe reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_pfl.benchmark.states import StateDataset, collate_states

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
        self, train: StateDataset, val: StateDataset, tests: Sequence[StateDataset], probe: ProbeSet, *, batch_size: int
    ) -> None:
        super().__init__()
        self.train_set, self.val_set, self.test_sets, self.probe_set = train, val, tuple(tests), probe
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Shuffled batches of equal size."""
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True, collate_fn=collate_states)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches in order."""
        return DataLoader(self.val_set, 8 * self.batch_size, collate_fn=collate_states)

    def test_dataloader(self) -> list[DataLoader[dict[str, Tensor]]]:
        """One loader per task, in the order of the tables."""
        return [DataLoader(test, 8 * self.batch_size, collate_fn=collate_states) for test in self.test_sets]

    def probe_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Shuffled batches for the relevance probe."""
        return DataLoader(self.probe_set, self.batch_size, shuffle=True)


@final
class ProbeSet(Dataset[dict[str, Tensor]]):
    """A task as the probe's language model reads it: states after pictures and question, the answer as a label.

    Args:
        examples: as the probe's own layers see them.
    """

    def __init__(self, examples: StateDataset) -> None:
        batch = collate_states([examples[index] for index in range(len(examples))])
        answers = batch["option_ids"].gather(1, batch["answer"][:, None])
        pad = torch.nn.functional.pad  # one more position, for the answer; what stands there bears on nothing before it
        self._states = pad(batch["states"], (0, 0, 0, 1))
        self._mask = pad(batch["attention_mask"], (0, 1), value=1)
        self._labels = pad(torch.full_like(batch["attention_mask"], -100), (0, 1))
        self._labels[:, -1:] = answers

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "inputs_embeds": self._states[index],
            "attention_mask": self._mask[index],
            "labels": self._labels[index],
        }
