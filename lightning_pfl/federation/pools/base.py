"""`ClientPool`: where clients' turns run. A pool decides the place, never the result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from lightning_pfl.federation.client import Client
from lightning_pfl.federation.jobs import Job, JobResult
from lightning_pfl.federation.snapshot import Snapshot

__all__ = ["ClientPool"]


class ClientPool(ABC):
    """Runs jobs. The same jobs give the same results, bit for bit, on every pool, in any number of places.

    A pool is entered once per ``trainer.fit`` (or validate, test, predict) and closed at its end, also when the run
    is interrupted. It can be started again after it was closed.
    """

    @abstractmethod
    def start(self, clients: Sequence[Client], snapshots: Mapping[str, Snapshot]) -> None:
        """Get places ready; check before anything runs that every client fits somewhere.

        Args:
            clients: all of the run, with their resources.
            snapshots: what jobs refer to by `Job.snapshot`.

        Raises:
            ValueError: a client asks for more than any place has; the message has both numbers.
        """

    @abstractmethod
    def run(self, jobs: Sequence[Job]) -> Iterator[JobResult]:
        """Run jobs and yield each result as soon as it is there, in any order.

        A job that raised yields a result with a `Failure`, and the others go on. A job whose place died is run again
        in a new place, a bounded number of times, before it counts as failed.
        """

    @abstractmethod
    def close(self) -> None:
        """Give everything back. Safe to call twice, and after an interrupt."""
