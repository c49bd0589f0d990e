"""What systems have to do: how many clients train what, on which rows.

Rows come from seeds alone, so that processes of any environment make the same ones. Needs numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

__all__ = ["WORKLOADS", "Workload", "client_rows", "cohort", "held_out_rows"]


@dataclass(frozen=True)
class Workload:
    """FedAvg of an MLP with two hidden layers by SGD: a client trains one epoch a round, its rows in a fixed order.

    Attributes:
        name: as in the tables.
        clients: registered.
        cohort: of them, how many train in a round.
        rounds: of training.
        rows: of a client; all clients have as many.
        hidden: width of both hidden layers.
        features: of a row.
        classes: of labels; each client's are drawn by a Dirichlet distribution of its own, alpha 0.5.
        batch: rows of a step.
        rate: learning rate.
    """

    name: str
    clients: int
    cohort: int
    rounds: int
    rows: int = 200
    hidden: int = 64
    features: int = 32
    classes: int = 10
    batch: int = 32
    rate: float = 0.1

    @property
    def steady_turns(self) -> int:
        """Client-rounds after the first round."""
        return self.cohort * (self.rounds - 1)


WORKLOADS = {
    one.name: one
    for one in (
        Workload("W1-tiny", clients=3, cohort=3, rounds=2),
        Workload("W1", clients=20, cohort=20, rounds=5),
        Workload("W2", clients=1000, cohort=20, rounds=20),
        Workload("W3", clients=20, cohort=20, rounds=5, hidden=1024),
        Workload("W3-long", clients=2, cohort=2, rounds=3, rows=16_000, hidden=1024),
    )
}
"""By name. W1-tiny is for tests of the harness; a segment of W3-long is 500 steps, two seconds of a core and more."""


def cohort(workload: Workload, round: int) -> list[int]:
    """Who trains in a round, for systems that let their user choose.

    Args:
        workload: of which.
        round: from 0.

    Returns:
        Indices of clients, ascending.
    """
    drawn = np.random.default_rng((3, round)).choice(workload.clients, workload.cohort, replace=False)
    return sorted(drawn.tolist())


@cache
def client_rows(workload: Workload, client: int) -> tuple[np.ndarray, np.ndarray]:
    """A client's rows.

    Args:
        workload: of which.
        client: from 0.

    Returns:
        float32 ``[rows, features]`` and int64 ``[rows]``.
    """
    random = np.random.default_rng((1, client))
    labels = random.choice(workload.classes, workload.rows, p=random.dirichlet(np.full(workload.classes, 0.5)))
    return _features(workload, labels, random), labels.astype(np.int64)


def held_out_rows(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    """200 rows of no client, in the forms of `client_rows`, with labels in equal shares."""
    labels = np.arange(200) % workload.classes
    return _features(workload, labels, np.random.default_rng(2)), labels.astype(np.int64)


def _features(workload: Workload, labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    centres = np.random.default_rng(0).normal(size=(workload.classes, workload.features)) / 2
    noise = random.normal(size=(len(labels), workload.features))
    return (centres[labels] + noise).astype(np.float32)
