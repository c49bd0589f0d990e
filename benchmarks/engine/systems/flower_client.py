"""A client's turn in Flower, in a module that Ray's actors import, so that they keep model and rows between turns."""

from __future__ import annotations

from functools import lru_cache

import torch
from flwr.app import ArrayRecord
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.engine.model import Batches, network
from benchmarks.engine.workload import WORKLOADS

__all__ = ["turn"]


def turn(name: str, client: int, arrays: ArrayRecord) -> tuple[ArrayRecord, int]:
    """Train one epoch.

    Args:
        name: of the workload.
        client: from 0.
        arrays: the server's weights.

    Returns:
        The client's weights, and how many rows they come from.
    """
    torch.set_num_threads(1)
    workload, model = WORKLOADS[name], _model(name)
    model.load_state_dict(arrays.to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=workload.rate)
    for features, labels in Batches(workload, client):
        optimizer.zero_grad()
        cross_entropy(model(features), labels).backward()
        optimizer.step()
    return ArrayRecord(model.state_dict()), workload.rows


@lru_cache(maxsize=1)
def _model(name: str) -> nn.Module:
    return network(WORKLOADS[name])
