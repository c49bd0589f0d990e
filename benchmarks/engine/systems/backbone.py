"""W6: four actors train adapters on one frozen backbone of 500 MB. How many backbones do they hold?

The same run on a backbone of a hundredth tells what actors hold of their own; what four of them hold beyond that,
divided by the backbone, is what this program says.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning as L
import torch
import torch._dynamo
from torch import Tensor, nn

from benchmarks.engine.marks import Marks
from benchmarks.engine.model import Steps
from benchmarks.engine.systems.module import BARE, RoundMarks, quiet
from benchmarks.engine.tree import descendants, pss_mib
from lightning_pfl import CoLoRA, FedAvg, FederatedStrategy, RayPool

ACTORS, CLIENTS, ROUNDS = 4, 8, 2
BIG, SMALL = 2048, 208  # widths of 30 square layers: 503 MB and 5 MB in float32


class Backbone(L.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(width, width)}) for _ in range(30))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        x = batch
        for block in self.blocks:
            x = x + torch.tanh(block["fc"](x)) / 8
        return x.square().mean()

    def train_dataloader(self) -> Steps:
        generator = torch.Generator().manual_seed(int(self.trainer.strategy.client_id.removeprefix("client-")))
        return Steps([torch.randn(8, self.width, generator=generator)])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


class Actors(L.Callback):
    """Reads the actors' memory after the last round."""

    federated_scope = "server"

    def __init__(self) -> None:
        self.mib: list[float] = []

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = [pid for pid in descendants(os.getpid()) if "FederatedClients" in command_of(pid)]
        self.mib = [pss_mib(pid) for pid in found]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def run(width: int, marks: Marks | None) -> list[float]:
    """Memory of each actor in MiB."""
    actors = Actors()
    callbacks = [CoLoRA(rank=8, alpha=16, num_blocks=4), actors, *([RoundMarks(marks)] if marks else [])]
    strategy = FederatedStrategy(
        clients=CLIENTS,
        aggregator=FedAvg(),
        pool=RayPool(num_actors=ACTORS, address="local", init={"num_cpus": ACTORS}),
    )
    L.Trainer(max_epochs=ROUNDS, strategy=strategy, callbacks=callbacks, **BARE).fit(Backbone(width))
    assert len(actors.mib) == ACTORS, f"expected {ACTORS} actors, found {len(actors.mib)}"
    return actors.mib


def main() -> None:
    marks = Marks(sys.argv[2], rounds=ROUNDS)
    marks.imported()
    quiet()
    torch.set_num_threads(1)
    own = sum(run(SMALL, None))
    marks.started()
    held = sum(run(BIG, marks))
    backbone = 30 * 4 * (BIG * BIG + BIG - SMALL * SMALL - SMALL) / 2**20
    marks.write(
        actors_mib=round(held, 1),
        actors_own_mib=round(own, 1),
        backbone_mib=round(backbone, 1),
        backbones_held=round((held - own) / backbone, 3),
    )


if __name__ == "__main__":
    main()
