"""W5: twenty clients on two architectures, half of each with half the rank, exchange P and Q for five rounds.

The third argument says who runs them: "local" and "ray" pools, or "fit", a plain ``Trainer.fit`` per client and round
of the same modules with `CoLoRA` as an ordinary callback, which exchanges nothing and carries nothing over.
"""

from __future__ import annotations

import sys

import lightning as L
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.engine.marks import Marks
from benchmarks.engine.model import Steps
from benchmarks.engine.systems.module import BARE, RoundMarks, quiet
from lightning_pfl import Client, CoLoRA, FedAvg, FederatedStrategy, LocalPool, RayPool
from lightning_pfl.callbacks.rank_limit import RankLimit

CLIENTS, ROUNDS, RANK, WIDTHS = 20, 5, 8, (64, 96)
ADAPTERS = {"rank": RANK, "alpha": 2 * RANK, "num_blocks": 2}


class Residual(L.LightningModule):
    """Four residual blocks of a width, with a head of their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(width)
            self.embed = nn.Linear(32, width)
            self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(width, width)}) for _ in range(4))
            self.head = nn.Linear(width, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x = self.embed(batch[0])
        for block in self.blocks:
            x = x + torch.tanh(block["fc"](x))
        return mse_loss(self.head(x), batch[1])

    def train_dataloader(self) -> Steps:
        return batches(int(self.trainer.strategy.client_id.removeprefix("client-")))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


class Wide(Residual):
    def __init__(self) -> None:
        super().__init__(WIDTHS[1])


def batches(client: int) -> Steps:
    """Seven batches of 32 rows."""
    generator = torch.Generator().manual_seed(client)
    features = torch.randn(7, 32, 32, generator=generator)
    return Steps([(one, one.sum(1, keepdim=True)) for one in features])


def federate(pool: LocalPool | RayPool, marks: Marks) -> None:
    ids = [f"client-{index}" for index in range(CLIENTS)]
    strategy = FederatedStrategy(
        clients=[Client(name, model=Wide if index % 2 else None) for index, name in enumerate(ids)],
        aggregator=FedAvg(),
        pool=pool,
    )
    limit = RankLimit({name: RANK if index % 4 < 2 else RANK // 2 for index, name in enumerate(ids)})
    callbacks = [CoLoRA(**ADAPTERS), limit, RoundMarks(marks)]
    trainer = L.Trainer(max_epochs=ROUNDS, strategy=strategy, callbacks=callbacks, **BARE)
    marks.started()
    trainer.fit(Residual(WIDTHS[0]))


def fit(marks: Marks) -> None:
    modules = [Residual(WIDTHS[index % 2]) for index in range(CLIENTS)]
    marks.started()
    for _ in range(ROUNDS):
        for index, module in enumerate(modules):
            L.Trainer(max_epochs=1, callbacks=[CoLoRA(**ADAPTERS)], **BARE).fit(module, batches(index))
        marks.round()


def main() -> None:
    marks = Marks(sys.argv[2], rounds=ROUNDS)
    marks.imported()
    quiet()
    torch.set_num_threads(1)
    if sys.argv[3] == "fit":
        fit(marks)
    else:
        federate(LocalPool() if sys.argv[3] == "local" else RayPool(address="local", init={"num_cpus": 2}), marks)
    marks.write()


if __name__ == "__main__":
    main()
