"""What can go wrong that a caller may want to catch; everything else is a `ValueError` or a `TypeError`."""

from __future__ import annotations

__all__ = ["CheckpointMismatchError", "ClientFailedError", "FederationError", "RejectedUpdateError"]


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


class RejectedUpdateError(FederationError):
    """A client's update does not satisfy what an aggregation needs; the message names the client and the reason."""


class CheckpointMismatchError(FederationError):
    """A checkpoint belongs to another rank, other clients or another base model than this run."""
