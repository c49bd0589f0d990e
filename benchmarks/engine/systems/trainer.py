"""The same segments by hand in Lightning: a ``Trainer.fit`` of one epoch per client and round.

A third argument says how much of a segment: "fresh" fits carry nothing over, "resumed" ones go on from a checkpoint on the
disk, as a client with an optimizer or a schedule of its own has to.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import lightning as L
import torch
import torch._dynamo  # noqa: F401 - the first optimizer step would import it
from torch import Tensor

from benchmarks.engine.marks import Marks
from benchmarks.engine.model import Batches, accuracy
from benchmarks.engine.systems.module import BARE, Classifier, quiet
from benchmarks.engine.workload import WORKLOADS, cohort


class Overwrite(L.Callback):
    """Puts the server's weights over those of the checkpoint."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.net.load_state_dict(self.weights)


def main() -> None:
    workload, marks, resumed = WORKLOADS[sys.argv[1]], Marks(sys.argv[2]), sys.argv[3] == "resumed"
    marks.imported()
    quiet()
    torch.set_num_threads(1)
    module = Classifier(workload)
    weights = {name: value.clone() for name, value in module.net.state_dict().items()}
    turns: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        marks.started()
        for round in range(workload.rounds):
            total = {name: torch.zeros_like(value) for name, value in weights.items()}
            clients = cohort(workload, round)
            for client in clients:
                turns[client] = turns.get(client, 0) + 1
                path = Path(folder) / f"{client}.ckpt"
                trainer = L.Trainer(max_epochs=turns[client] if resumed else 1, callbacks=[Overwrite(weights)], **BARE)
                trainer.fit(module, Batches(workload, client), ckpt_path=path if resumed and path.exists() else None)
                if resumed:
                    trainer.save_checkpoint(path)
                for name, value in module.net.state_dict().items():
                    total[name].add_(value, alpha=1 / len(clients))
            weights = total
            marks.round()
    marks.write(accuracy=accuracy(workload, weights))


if __name__ == "__main__":
    main()
