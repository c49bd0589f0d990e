"""The model of the workloads as a user of Lightning would write it, and what the measurements add to a Trainer."""

from __future__ import annotations

import logging
import warnings

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.engine.marks import Marks
from benchmarks.engine.model import Batches, network
from benchmarks.engine.workload import Workload

__all__ = ["BARE", "Classifier", "RoundMarks", "quiet"]

BARE = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Arguments of a Trainer that writes and prints nothing."""


class Classifier(L.LightningModule):
    """Trains on the rows of the client that ``trainer.strategy.client_id`` names, unless it is handed a loader."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.workload = workload
        self.net = network(workload)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> Batches:
        return Batches(self.workload, int(self.trainer.strategy.client_id.removeprefix("client-")))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.workload.rate)


class RoundMarks(L.Callback):
    """Marks the ends of rounds, on the server, whose epochs they are."""

    federated_scope = "server"

    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.marks.round()


def quiet() -> None:
    """Lines of thousands of Trainers would cost time, too."""
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
