"""`ForwardingLogger`: what a client hands to its loggers travels to the server, whose loggers replay it.

One run has one set of loggers, on the driver. A client's Trainer holds a `ForwardingLogger` in their place, which keeps
metrics as plain records. `replay` hands them to the server's loggers as ``client/<id>/<name>``.
"""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any, final

import lightning as L
from lightning.pytorch.loggers import Logger
from typing_extensions import override

from lightning_pfl.federation.jobs import LogRecord
from lightning_pfl.federation.metrics import client_name, local_name

__all__ = ["ForwardingLogger", "replay"]

_LOG = logging.getLogger(__name__)


@final
class ForwardingLogger(Logger):
    """Keeps what a client logs. Only numbers travel: images, files and hyperparameters stay behind.

    Args:
        save_dir: of the run; callbacks of a client may put files below it, in ``clients/<id>``.

    Example:
        >>> logger = ForwardingLogger(None)
        >>> logger.log_metrics({"train_loss": 0.5, "epoch": 0.0}, step=3)
        >>> logger.records
        [LogRecord(metrics={'train_loss': 0.5, 'epoch': 0.0}, step=3)]
    """

    def __init__(self, save_dir: str | None) -> None:
        super().__init__()
        self._save_dir = save_dir
        self.records: list[LogRecord] = []
        self._trainer: L.Trainer | None = None

    def begin(self, client_id: str, trainer: L.Trainer) -> None:
        """Belong to one client for one turn."""
        self._trainer = trainer
        if self._save_dir is not None:
            self._save_dir = os.path.join(self._save_dir, "clients", client_id)

    @property
    def name(self) -> str:
        """The same for all clients."""
        return "client"

    @property
    def version(self) -> str:
        """None of its own."""
        return ""

    @property
    @override
    def save_dir(self) -> str | None:
        return self._save_dir

    @property
    def experiment(self) -> Any:
        """Takes every call and does nothing; the first of a name is logged."""
        return _Absent("logger.experiment")

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        numbers = {name: float(value) for name, value in metrics.items()}
        if self._trainer is not None and self._trainer.validating:
            numbers = {local_name(name) if name != "epoch" else name: value for name, value in numbers.items()}
        self.records.append(LogRecord(numbers, step))

    @override
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The server's loggers have the hyperparameters already."""


class _Absent:
    """Stands for an experiment object that is on another machine."""

    _told: set[str] = set()  # noqa: RUF012 - one log line per process and name

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self._path}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> _Absent:
        if self._path not in self._told:
            self._told.add(self._path)
            _LOG.warning(
                "`%s` does nothing in a client: only metrics travel to the server's loggers. Log from a callback with "
                "`federated_scope = 'server'`, or write files to `trainer.log_dir`.",
                self._path,
            )
        return self

    def __getitem__(self, key: Any) -> _Absent:
        return self


def replay(client_id: str, records: Iterable[LogRecord], loggers: Iterable[Logger]) -> None:
    """Hand a client's records to the server's loggers, under the client's name and at the client's own steps."""
    kept = list(records)
    for logger in loggers:
        for record in kept:
            metrics = {client_name(client_id, name): value for name, value in record.metrics.items()}
            logger.log_metrics(metrics, step=record.step)
