"""This package: `FederatedStrategy` over ``LocalPool`` or ``RayPool``, as the third argument says ("local", "ray")."""

from __future__ import annotations

import sys

import lightning as L
import torch
import torch._dynamo

from benchmarks.engine.marks import Marks
from benchmarks.engine.model import accuracy
from benchmarks.engine.systems.module import BARE, Classifier, RoundMarks, quiet
from benchmarks.engine.workload import WORKLOADS
from lightning_pfl import FedAvg, FederatedStrategy, LocalPool, RayPool


def main() -> None:
    workload = WORKLOADS[sys.argv[1]]
    marks = Marks(sys.argv[2], rounds=workload.rounds)
    pool = LocalPool() if sys.argv[3] == "local" else RayPool(address="local", init={"num_cpus": 2})
    marks.imported()
    quiet()
    torch.set_num_threads(1)
    module = Classifier(workload)
    strategy = FederatedStrategy(
        clients=workload.clients,
        aggregator=FedAvg(),
        pool=pool,
        share=["net"],
        fraction=workload.cohort / workload.clients,
    )
    trainer = L.Trainer(max_epochs=workload.rounds, strategy=strategy, callbacks=[RoundMarks(marks)], **BARE)
    marks.started()
    trainer.fit(module)
    marks.write(accuracy=accuracy(workload, module.net.state_dict()))


if __name__ == "__main__":
    main()
