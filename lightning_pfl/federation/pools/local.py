"""`LocalPool`: clients' turns in this process, one after another. For small runs, notebooks, tests and debuggers."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import final

import torch

from lightning_pfl.federation.client import Client
from lightning_pfl.federation.jobs import Job, JobResult
from lightning_pfl.federation.pools.base import ClientPool
from lightning_pfl.federation.pools.isolation import ProcessSettings
from lightning_pfl.federation.pools.placement import Placement
from lightning_pfl.federation.snapshot import Snapshot
from lightning_pfl.federation.turn import run_job

__all__ = ["LocalPool"]


@final
class LocalPool(ClientPool):
    """Runs every turn in this process, without other processes and without Ray.

    A turn leaves random generators, threads, signal handlers and autograd modes of the process as it found them. A turn
    that has begun cannot be cancelled: a deadline (`RoundRules`) only keeps further ones from beginning.

    Args:
        resources: named resources of the cluster that this process stands in for, so that clients which ask for them
            may run here too.

    Example:
        >>> pool = LocalPool()
        >>> pool.start([Client("a"), Client("b")], {})
        >>> list(pool.run([]))
        []
        >>> pool.close()
    """

    def __init__(self, *, resources: Mapping[str, float] | None = None) -> None:
        self._resources = dict(resources or {})
        self._snapshots: dict[str, Snapshot] = {}
        self._settings: ProcessSettings | None = None
        self._queue: deque[Job] = deque()

    def look(self, clients: Sequence[Client]) -> Placement:
        """Check that each client fits into this process. See `ClientPool.look`."""
        has = {"num_cpus": float(os.cpu_count() or 1), "num_gpus": float(_num_gpus()), **self._resources}
        for client in clients:
            asks = {"num_cpus": client.num_cpus, "num_gpus": client.num_gpus, **client.resources}
            for name, amount in asks.items():
                if amount > has.get(name, 0):
                    raise ValueError(
                        f"Client `{client.id}` asks for {name}={amount:g}, but this machine has {has.get(name, 0):g}, "
                        "and `LocalPool` runs all clients on it. Ask for less, or use `RayPool(address=...)` with a "
                        "cluster that has it."
                    )
        return super().look(clients)

    def start(self, clients: Sequence[Client], snapshots: Mapping[str, Snapshot]) -> None:
        """Check that each client fits into this process. See `ClientPool.start`."""
        self.look(clients)
        self._snapshots = dict(snapshots)
        self._settings = ProcessSettings.capture()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue them. See `ClientPool.submit`."""
        if self._settings is None and jobs:
            raise RuntimeError(
                "This `LocalPool` is not running: call `start` before `submit`, and not `close` in between."
            )
        self._queue.extend(jobs)

    def next(self, timeout: float | None = None) -> JobResult | None:
        """Run the next job in their order, to its end. See `ClientPool.next`."""
        if not self._queue or (timeout is not None and timeout <= 0):
            return None
        assert self._settings is not None
        job = self._queue.popleft()
        with self._settings.turn(seed=job.seed, num_threads=job.num_threads):
            return run_job(self._snapshots[job.snapshot], job)

    def cancel(self, client_ids: Collection[str]) -> None:
        """Forget those that have not begun. See `ClientPool.cancel`."""
        self._queue = deque(job for job in self._queue if job.assignment.client_id not in client_ids)

    def close(self) -> None:
        """Forget the snapshots. See `ClientPool.close`."""
        self._snapshots, self._settings = {}, None
        self._queue.clear()


def _num_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
