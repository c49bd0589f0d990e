"""What can go wrong that a caller may want to catch; everything else is a `ValueError` or a `TypeError`."""

from __future__ import annotations

from functools import partial
from typing import Any

__all__ = [
    "CheckpointMismatchError",
    "ClientFailedError",
    "FederationError",
    "PrivacyBudgetError",
    "RejectedUpdateError",
]


class FederationError(RuntimeError):
    """A federated run cannot go on."""


class ClientFailedError(FederationError):
    """A client raised, or the place where it ran died.

    Args:
        client_id: whose turn failed.
        round: in which round, from 0.
        trace: the client's own traceback, as text.

    Example:
        >>> error = ClientFailedError("ward-3", 2, "ZeroDivisionError: division by zero")
        >>> error.client_id
        'ward-3'
    """

    def __init__(self, client_id: str, round: int, trace: str) -> None:
        super().__init__(f"Client `{client_id}` failed in round {round}. Its own traceback:\n{trace}")
        self.client_id = client_id
        self.round = round
        self.trace = trace

    def __reduce__(self) -> tuple[type[ClientFailedError], tuple[str, int, str]]:
        return type(self), (self.client_id, self.round, self.trace)


class PrivacyBudgetError(FederationError):
    """What a client would send next costs more than its budget allows; nothing of it was sent.

    Args:
        client_id: whose budget.
        round: in which round, from 0.
        spent: epsilon of all that it has sent.
        needed: epsilon with what it would send next.
        epsilon: the budget's.
        delta: the budget's.

    Example:
        >>> error = PrivacyBudgetError("ward-3", 12, spent=7.9, needed=8.2, epsilon=8.0, delta=1e-5)
        >>> error.client_id, error.spent
        ('ward-3', 7.9)
    """

    def __init__(
        self, client_id: str, round: int, *, spent: float, needed: float, epsilon: float, delta: float
    ) -> None:
        super().__init__(
            f"Client `{client_id}` has spent epsilon {spent:.4g} of its budget of {epsilon:g} (delta {delta:g}), and "
            f"what it would send in round {round} brings it to {needed:.4g}. So it sends nothing more and the run ends "
            "here; a checkpoint has all rounds before. To go on, resume with a larger `PrivacyBudget(epsilon=...)`; "
            "for a run that lasts, start anew with more noise: `PrivacyBudget.noise_multiplier(releases=...)`."
        )
        self.client_id = client_id
        self.round = round
        self.spent = spent
        self.needed = needed
        self.epsilon = epsilon
        self.delta = delta

    def __reduce__(self) -> tuple[Any, ...]:
        given = {name: getattr(self, name) for name in ("spent", "needed", "epsilon", "delta")}
        return partial(type(self), **given), (self.client_id, self.round)


class RejectedUpdateError(FederationError):
    """A client's update does not satisfy what an aggregation needs; the message names the client and the reason."""


class CheckpointMismatchError(FederationError):
    """A checkpoint is missing or damaged, or belongs to another rank, other clients or another base model."""
