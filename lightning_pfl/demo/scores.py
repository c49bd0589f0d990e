"""How many questions each client's model answered right, on its own task and on the others'."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Count", "Scores", "wilson_interval"]


@dataclass(frozen=True)
class Count:
    """Right answers out of some.

    Example:
        >>> (Count(3, 4) + Count(1, 4)).share
        0.5
    """

    right: int
    total: int

    def __add__(self, other: Count) -> Count:
        return Count(self.right + other.right, self.total + other.total)

    @property
    def share(self) -> float:
        """Accuracy, between 0 and 1; NaN of nothing."""
        return self.right / self.total if self.total else math.nan


@dataclass(frozen=True)
class Scores:
    """What every client's model scores on every task, under one method.

    Attributes:
        method: as a reader should see it.
        counts: by client id, then by task name.
        own: each client's own task.
    """

    method: str
    counts: Mapping[str, Mapping[str, Count]]
    own: Mapping[str, str]

    def on_own(self, client_id: str) -> Count:
        """On the client's own task."""
        return self.counts[client_id][self.own[client_id]]

    def on_others(self, client_id: str) -> Count:
        """On the tasks of the other clients, each counted once, all with equal weight if their tests are."""
        others = [count for task, count in self.counts[client_id].items() if task != self.own[client_id]]
        return sum(others, Count(0, 0))

    def self_mean(self) -> float:
        """The paper's Self: mean over clients of the accuracy on the own task."""
        return _mean([self.on_own(client).share for client in self.counts])

    def others_mean(self) -> float:
        """The paper's Others: mean over clients of the accuracy on the others' tasks."""
        return _mean([self.on_others(client).share for client in self.counts])


def wilson_interval(count: Count, *, z: float = 1.96) -> tuple[float, float]:
    """Where the true accuracy lies, by Wilson's score interval.

    Args:
        count: right answers out of independent questions.
        z: 1.96 for 95 %.

    Returns:
        Lower and upper bound, between 0 and 1; (0, 1) of nothing.

    Source:
        Wilson, JASA 1927; holds for few questions and near 0 or 1, where the normal interval does not.

    Example:
        >>> low, high = wilson_interval(Count(50, 100))
        >>> round(low, 3), round(high, 3)
        (0.404, 0.596)
    """
    if not count.total:
        return 0.0, 1.0
    n, p = count.total, count.share
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
