"""The floor: a bare PyTorch loop over clients, one model that all of them take turns on."""

from __future__ import annotations

import sys

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.engine.marks import Marks
from benchmarks.engine.model import Batches, accuracy, network
from benchmarks.engine.workload import WORKLOADS, Workload, cohort

__all__ = ["looped_round"]


def looped_round(workload: Workload, model: nn.Module, weights: dict[str, Tensor], round: int) -> dict[str, Tensor]:
    """One round of FedAvg.

    Args:
        workload: of which.
        model: `network`; what it holds is of no consequence.
        weights: of the server.
        round: from 0.

    Returns:
        The server's weights after it.
    """
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
    return total


def main() -> None:
    workload = WORKLOADS[sys.argv[1]]
    marks = Marks(sys.argv[2], rounds=workload.rounds)
    marks.imported()
    torch.set_num_threads(1)
    model = network(workload)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    marks.started()
    for round in range(workload.rounds):
        weights = looped_round(workload, model, weights, round)
        marks.round()
    marks.write(accuracy=accuracy(workload, weights))


if __name__ == "__main__":
    main()
