"""W4: 1,000 clients, each with a megabyte of its own, ten of them a round for 200 rounds. What does the driver hold?

It says by how many MiB the driver's memory has grown since the third round, after which everything is warm, and by how
many in the last half of the run.
"""

from __future__ import annotations

import gc
import os
import sys

import lightning as L
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.engine.marks import Marks
from benchmarks.engine.model import Steps
from benchmarks.engine.systems.module import BARE, RoundMarks, quiet
from benchmarks.engine.tree import pss_mib
from lightning_pfl import FedAvg, FederatedStrategy, LocalPool

CLIENTS, COHORT, ROUNDS = 1000, 10, 200


class Personal(L.LightningModule):
    """A small shared encoder, and a private layer of 512 x 512 weights: one MiB in float32."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encoder, self.own, self.head = nn.Linear(32, 512), nn.Linear(512, 512), nn.Linear(512, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return mse_loss(self.head(self.own(self.encoder(batch[0]))), batch[1])

    def train_dataloader(self) -> Steps:
        generator = torch.Generator().manual_seed(int(self.trainer.strategy.client_id.removeprefix("client-")))
        features = torch.randn(8, 32, generator=generator)
        return Steps([(features, features.sum(1, keepdim=True))])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.001)


class Memory(L.Callback):
    """Reads the driver's memory after every round that is named."""

    federated_scope = "server"

    def __init__(self, rounds: set[int]) -> None:
        self.rounds, self.read = rounds, dict[int, float]()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 in self.rounds:
            gc.collect()
            self.read[trainer.current_epoch + 1] = pss_mib(os.getpid())


def main() -> None:
    marks = Marks(sys.argv[2], rounds=ROUNDS)
    marks.imported()
    quiet()
    torch.set_num_threads(1)
    memory = Memory({3, 50, ROUNDS // 2, 150, ROUNDS})
    strategy = FederatedStrategy(
        clients=CLIENTS, aggregator=FedAvg(), pool=LocalPool(), share=["encoder"], fraction=COHORT / CLIENTS
    )
    trainer = L.Trainer(max_epochs=ROUNDS, strategy=strategy, callbacks=[RoundMarks(marks), memory], **BARE)
    marks.started()
    trainer.fit(Personal())
    states = len(strategy.store.ids())
    marks.write(
        clients_with_state=states,
        grown_mib=round(memory.read[ROUNDS] - memory.read[3], 1),
        grown_in_last_half_mib=round(memory.read[ROUNDS] - memory.read[ROUNDS // 2], 1),
    )


if __name__ == "__main__":
    main()
