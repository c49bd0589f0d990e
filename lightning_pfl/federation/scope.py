"""Which callbacks run on the server, around rounds, and which in each client, around its own training."""

from __future__ import annotations

from collections.abc import Iterable

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelSummary, ProgressBar, Timer

__all__ = ["is_of_server", "of_clients", "of_server"]

_SERVER = (Checkpoint, EarlyStopping, ProgressBar, ModelSummary, Timer)
_SERVER_NAMES = {"SaveConfigCallback"}  # of lightning.pytorch.cli, which needs an extra package to be imported


def is_of_server(callback: L.Callback) -> bool:
    """Whether a callback runs on the server.

    Checkpoints, early stopping, progress bars, model summaries, timers and the CLI's `SaveConfigCallback` do; all else
    runs in every client. An attribute ``federated_scope``, "server" or "client", decides otherwise.

    Raises:
        ValueError: the attribute is neither.

    Example:
        >>> from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
        >>> is_of_server(EarlyStopping("val_loss")), is_of_server(LearningRateMonitor())
        (True, False)
        >>> stopper = EarlyStopping("val_loss")
        >>> stopper.federated_scope = "client"  # each client stops by itself
        >>> is_of_server(stopper)
        False
    """
    scope = getattr(callback, "federated_scope", None)
    if scope is None:
        names = {base.__name__ for base in type(callback).__mro__}
        return isinstance(callback, _SERVER) or bool(names & _SERVER_NAMES)
    if scope not in ("server", "client"):
        raise ValueError(
            f'`{type(callback).__name__}.federated_scope` says where a callback runs, "server" or "client", but is '
            f"{scope!r}."
        )
    return bool(scope == "server")


def of_server(callbacks: Iterable[L.Callback]) -> list[L.Callback]:
    """Those that run around rounds, in their order."""
    return [callback for callback in callbacks if is_of_server(callback)]


def of_clients(callbacks: Iterable[L.Callback]) -> list[L.Callback]:
    """Those that run in every client, in their order."""
    return [callback for callback in callbacks if not is_of_server(callback)]
