"""`LocalPool`, the bare loop and plain fits by turns in one process: a round of each, and again.

Between processes a crowded machine shifts CPU times by a factor of two; from one round to the next it does so less, and
the medians of ratios taken round by round least. The workload is named as in `workload`, with ``-paired`` behind it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import lightning as L
import torch
import torch._dynamo

from benchmarks.engine.marks import Marks
from benchmarks.engine.model import network
from benchmarks.engine.systems.loop import looped_round
from benchmarks.engine.systems.module import BARE, Classifier, quiet
from benchmarks.engine.systems.trainer import Fits
from benchmarks.engine.workload import WORKLOADS, Workload
from lightning_pfl import FedAvg, FederatedStrategy, LocalPool

LEAST = 7
"""Rounds, the first of which is not counted."""


class Others(L.Callback):
    """After each round of the federation runs one of every other kind, and notes the CPU-seconds of all."""

    federated_scope = "server"

    def __init__(self, workload: Workload, folder: Path) -> None:
        self.kinds: dict[str, Callable[[int], None]] = {
            "loop": self._loop,
            "fit": Fits(workload, None).round,
            "fit, resumed": Fits(workload, folder).round,
        }
        self.seconds: dict[str, list[float]] = {"LocalPool": [], **{name: [] for name in self.kinds}}
        self._workload, self._model, self._begun = workload, network(workload), 0.0
        self._weights = {name: value.clone() for name, value in self._model.state_dict().items()}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begun = time.process_time()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds["LocalPool"].append(time.process_time() - self._begun)
        for name, run in self.kinds.items():
            start = time.process_time()
            run(trainer.current_epoch)
            self.seconds[name].append(time.process_time() - start)

    def _loop(self, round: int) -> None:
        self._weights = looped_round(self._workload, self._model, self._weights, round)


def main() -> None:
    workload = WORKLOADS[sys.argv[1].removesuffix("-paired")]
    marks = Marks(sys.argv[2], rounds=0)  # ratios within a round are the result
    marks.imported()
    quiet()
    torch.set_num_threads(1)
    strategy = FederatedStrategy(
        clients=workload.clients,
        aggregator=FedAvg(),
        pool=LocalPool(),
        share=["net"],
        fraction=workload.cohort / workload.clients,
    )
    rounds = max(LEAST, workload.rounds) if workload.hidden < 1024 else workload.rounds
    with tempfile.TemporaryDirectory() as folder:
        others = Others(workload, Path(folder))
        trainer = L.Trainer(max_epochs=rounds, strategy=strategy, callbacks=[others], **BARE)
        marks.started()
        trainer.fit(Classifier(workload))
    steady = {name: seconds[1:] for name, seconds in others.seconds.items()}
    said = {f"{name}, ms a turn": round(1000 * median(steady[name]) / workload.cohort, 2) for name in steady}
    for name in ("loop", "fit", "fit, resumed"):
        ratios = [mine / other for mine, other in zip(steady["LocalPool"], steady[name], strict=True)]
        said[f"x {name}"] = round(median(ratios), 3)
    marks.write(**said)


if __name__ == "__main__":
    main()
