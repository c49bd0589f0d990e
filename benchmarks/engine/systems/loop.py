"""The floor: a bare PyTorch loop over clients, one model that all of them take turns on."""

from __future__ import annotations

import sys

import torch
import torch._dynamo  # noqa: F401 - the first optimizer step would import it
from torch.nn.functional import cross_entropy

from benchmarks.engine.marks import Marks
from benchmarks.engine.model import Batches, accuracy, network
from benchmarks.engine.workload import WORKLOADS, cohort


def main() -> None:
    workload, marks = WORKLOADS[sys.argv[1]], Marks(sys.argv[2])
    marks.imported()
    torch.set_num_threads(1)
    model = network(workload)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    marks.started()
    for round in range(workload.rounds):
        total = {name: torch.zeros_like(value) for name, value in weights.items()}
        clients = cohort(workload, round)
        for client in clients:
            model.load_state_dict(weights)
            optimizer = torch.optim.SGD(model.parameters(), lr=workload.rate)
            for features, labels in Batches(workload, client):
                optimizer.zero_grad()
                cross_entropy(model(features), labels).backward()
                optimizer.step()
            for name, value in model.state_dict().items():
                total[name].add_(value, alpha=1 / len(clients))
        weights = total
        marks.round()
    marks.write(accuracy=accuracy(workload, weights))


if __name__ == "__main__":
    main()
