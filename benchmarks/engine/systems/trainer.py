"""The same segments by hand in Lightning: a ``Trainer.fit`` of one epoch per client and round.

A third argument says how much of a segment: "fresh" fits carry nothing over, "resumed" ones go on from a checkpoint on
the disk, as a client with an optimizer or a schedule of its own has to.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import lightning as L
import torch
import torch._dynamo
from torch import Tensor

from benchmarks.engine.marks import Marks
from benchmarks.engine.model import Batches, accuracy
from benchmarks.engine.systems.module import BARE, Classifier, quiet
from benchmarks.engine.workload import WORKLOADS, Workload, cohort

__all__ = ["Fits"]


class Overwrite(L.Callback):
    """Puts the server's weights over those of the checkpoint."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.net.load_state_dict(self.weights)


class Fits:
    """Rounds of FedAvg, each client by a Trainer that writes and prints nothing.

    Args:
        workload: of which.
        folder: for clients' checkpoints; None: they have none, and every fit is a first one.
    """

    def __init__(self, workload: Workload, folder: Path | None) -> None:
        self.workload, self.folder = workload, folder
        self.module = Classifier(workload)
        self.weights = {name: value.clone() for name, value in self.module.net.state_dict().items()}
        self._turns: dict[int, int] = {}

    def round(self, round: int) -> None:
        """Run one; from 0."""
        total = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        clients = cohort(self.workload, round)
        for client in clients:
            self._turns[client] = self._turns.get(client, 0) + 1
            path = None if self.folder is None else self.folder / f"{client}.ckpt"
            epochs = 1 if path is None else self._turns[client]
            trainer = L.Trainer(max_epochs=epochs, callbacks=[Overwrite(self.weights)], **BARE)
            trainer.fit(self.module, Batches(self.workload, client), ckpt_path=path if epochs > 1 else None)
            if path is not None:
                trainer.save_checkpoint(path)
            for name, value in self.module.net.state_dict().items():
                total[name].add_(value, alpha=1 / len(clients))
        self.weights = total


def main() -> None:
    workload = WORKLOADS[sys.argv[1]]
    marks = Marks(sys.argv[2], rounds=workload.rounds)
    marks.imported()
    quiet()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fits = Fits(workload, Path(folder) if sys.argv[3] == "resumed" else None)
        marks.started()
        for round in range(workload.rounds):
            fits.round(round)
            marks.round()
    marks.write(accuracy=accuracy(workload, fits.weights))


if __name__ == "__main__":
    main()
