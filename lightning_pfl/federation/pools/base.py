"""`ClientPool`: where clients' turns run. A pool decides the place, never the result."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import inf

from lightning_pfl.federation.client import Client
from lightning_pfl.federation.jobs import Job, JobResult
from lightning_pfl.federation.pools.placement import Demand, Placement
from lightning_pfl.federation.snapshot import Snapshot

__all__ = ["ClientPool"]


class ClientPool(ABC):
    """Runs jobs. The same jobs give the same results, bit for bit, on every pool, in any number of places.

    A pool is entered once per ``trainer.fit`` (or validate, test, predict) and closed at its end, also when the run
    is interrupted. It can be started again after it was closed. A client has at most one job at a time.
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
    def submit(self, jobs: Sequence[Job]) -> None:
        """Hand over jobs, beside those that are still at work."""

    @abstractmethod
    def next(self, timeout: float | None = None) -> JobResult | None:
        """Wait for the next result of any job, in the order in which they come.

        A job that raised gives a result with a `Failure`, and the others go on. A job whose place or device is gone
        is run again in a new place, where there are others, a bounded number of times, before it counts as failed.

        Args:
            timeout: seconds. None: as long as it takes.

        Returns:
            The result. None: the time is over, or there is nothing to wait for.
        """

    @abstractmethod
    def cancel(self, client_ids: Collection[str]) -> None:
        """Give up these clients' jobs: they end where they can be ended, and their results never come."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back. Safe to call twice, and after an interrupt."""

    def look(self, clients: Sequence[Client]) -> Placement:
        """What room there is, before any of it is used, and check that every client fits; nothing is started.

        By default one turn runs at a time, whatever it takes.

        Raises:
            ValueError: as in `start`.
        """
        return Placement({"here": dict.fromkeys(_resources(clients), inf)}, limit=1)

    def at_work(self) -> tuple[int, int] | None:
        """How many places run a turn now, and how many there are; None where that says nothing."""
        return None

    def wait_until_ready(self) -> None:  # noqa: B027 - most places are ready at once
        """Wait until places are ready to work, so that their start does not count against a deadline."""

    def now(self) -> float:
        """The time in seconds by which `next` waits, from any beginning."""
        return time.monotonic()

    def run(self, jobs: Sequence[Job]) -> Iterator[JobResult]:
        """Run jobs and yield each result as soon as it is there, in any order; cancel what is left if nobody reads."""
        self.submit(jobs)
        left = [job.assignment.client_id for job in jobs]
        try:
            while left:
                result = self.next()
                assert result is not None, "without a timeout, what was submitted comes"
                left.remove(result.client_id)
                yield result
        finally:
            if left:
                self.cancel(left)


def _resources(clients: Sequence[Client]) -> set[str]:
    """All that any of them asks for, by the names that clusters use."""
    return {name for client in clients for name in Demand.of(client).amounts}
