"""The model of the workloads, its batches and its score, for every system that computes with torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.engine.workload import Workload, client_rows, held_out_rows

__all__ = ["Batches", "Steps", "accuracy", "network"]


def network(workload: Workload) -> nn.Sequential:
    """The same weights in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(workload.features, workload.hidden),
            nn.ReLU(),
            nn.Linear(workload.hidden, workload.hidden),
            nn.ReLU(),
            nn.Linear(workload.hidden, workload.classes),
        )


class Batches:
    """A client's rows as slices in a fixed order: the cheapest loader there is, so that loading hides no difference."""

    def __init__(self, workload: Workload, client: int) -> None:
        features, labels = client_rows(workload, client)
        self.features, self.labels = torch.from_numpy(features), torch.from_numpy(labels)
        self.batch_size = workload.batch
        self.sampler = range(len(labels))  # what says how many rows there are

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.labels), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            yield self.features[chosen], self.labels[chosen]


class Steps:
    """Batches that are there already. Lightning would take a plain list for several loaders."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@torch.no_grad()
def accuracy(workload: Workload, weights: Mapping[str, Tensor]) -> float:
    """Share of `held_out_rows` that a state of `network` tells right."""
    model = network(workload)
    model.load_state_dict(dict(weights))
    features, labels = held_out_rows(workload)
    return float((model(torch.from_numpy(features)).argmax(1) == torch.from_numpy(labels)).float().mean())
