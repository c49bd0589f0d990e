"""`SimulatedPool`: slow devices, thin lines and clients that never answer, on a clock that nobody has to wait for.

Turns really run, in another pool; when their results count as there is computed. So deadlines, quorums and late results
behave as they would among such devices, and a run of them is over in no time and the same every time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import final

from lightning.pytorch.trainer.states import TrainerFn

from lightning_pfl.errors import FederationError
from lightning_pfl.federation.client import Client
from lightning_pfl.federation.jobs import Job, JobResult
from lightning_pfl.federation.pools.base import ClientPool
from lightning_pfl.federation.pools.local import LocalPool
from lightning_pfl.federation.pools.placement import Demand, Placement
from lightning_pfl.federation.snapshot import Snapshot

__all__ = ["Pace", "SimulatedPool"]


@final
@dataclass(frozen=True)
class Pace:
    """How fast a client is in one turn.

    Attributes:
        seconds: of training; ``inf`` for a client that hangs or is gone.
        download: bytes per second to the client.
        upload: bytes per second from the client.

    Example:
        >>> Pace(seconds=30, upload=1e6).until_there(down=0, up=5_000_000)
        35.0
    """

    seconds: float = 0.0
    download: float = inf
    upload: float = inf

    def __post_init__(self) -> None:
        if not self.seconds >= 0 or not self.download > 0 or not self.upload > 0:
            raise ValueError(f"A pace needs seconds of at least 0 and bytes per second above 0, but is {self}.")

    def until_there(self, *, down: int, up: int) -> float:
        """Seconds from the server's question to its answer, for so many bytes each way."""
        return down / self.download + self.seconds + up / self.upload


@final
class SimulatedPool(ClientPool):
    """Runs turns in another pool and lets their results come when a client's pace says.

    Every client is a device of its own: all of them work at the same time. Only training takes time; evaluation does
    not. A client that never answers does not run at all.

    Args:
        pace: of a client in a round, by its id and the round.
        pool: where turns really run. None: `LocalPool()`.

    Example:
        >>> pool = SimulatedPool(lambda client_id, round: Pace(seconds=60 if client_id == "slow" else 1))
        >>> pool.now()
        0.0
    """

    def __init__(self, pace: Callable[[str, int], Pace], *, pool: ClientPool | None = None) -> None:
        self._pace = pace
        self._pool = pool or LocalPool()
        self._now = 0.0
        self._reset()

    def _reset(self) -> None:
        self._asked: dict[str, tuple[float, int, Pace]] = {}  # by client: when, with how much; its result is to come
        self._coming: dict[str, tuple[float, JobResult]] = {}  # when it will be there
        self._silent: set[str] = set()

    def start(self, clients: Sequence[Client], snapshots: Mapping[str, Snapshot]) -> None:
        """Start the other pool. See `ClientPool.start`."""
        self._pool.start(clients, snapshots)

    def look(self, clients: Sequence[Client]) -> Placement:
        """Every client is a device of its own. See `ClientPool.look`."""
        self._pool.look(clients)
        resources = {name for client in clients for name in Demand.of(client).amounts}
        return Placement({"devices": dict.fromkeys(resources, inf)}, limit=len(clients))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Note the time, and run those that will ever answer. See `ClientPool.submit`."""
        for job in jobs:
            client_id, training = job.assignment.client_id, job.stage is TrainerFn.FITTING
            pace = self._pace(client_id, job.assignment.round) if training else Pace()
            if pace.seconds == inf:
                self._silent.add(client_id)
            else:
                self._asked[client_id] = self._now, job.assignment.personalized.nbytes, pace
                self._pool.submit([job])

    def next(self, timeout: float | None = None) -> JobResult | None:
        """The result that is there first, moving the clock to that moment. See `ClientPool.next`.

        Raises:
            FederationError: only clients that never answer are left, and there is no timeout.
        """
        while self._asked:
            result = self._pool.next()
            assert result is not None, "without a timeout, what was submitted comes"
            begun, down, pace = self._asked.pop(result.client_id)
            self._coming[result.client_id] = begun + pace.until_there(down=down, up=result.nbytes), result
        if not self._coming and not self._silent:
            return None
        first = min(self._coming, key=lambda client_id: (self._coming[client_id][0], client_id), default=None)
        if timeout is None and first is None:
            raise FederationError(
                f"The clients {sorted(self._silent)} never answer, so a round without a deadline would wait for ever. "
                "Set `RoundRules(deadline=...)`."
            )
        if first is None or (timeout is not None and self._coming[first][0] > self._now + timeout):
            assert timeout is not None
            self._now += max(0.0, timeout)
            return None
        there, result = self._coming.pop(first)
        self._now = max(self._now, there)
        return result

    def cancel(self, client_ids: Collection[str]) -> None:
        """Forget them. See `ClientPool.cancel`."""
        self._pool.cancel(client_ids)
        self._silent -= set(client_ids)
        for client_id in client_ids:
            self._asked.pop(client_id, None)
            self._coming.pop(client_id, None)

    def close(self) -> None:
        """Close the other pool; the clock goes on where it is. See `ClientPool.close`."""
        self._reset()
        self._pool.close()

    def wait_until_ready(self) -> None:
        """See `ClientPool.wait_until_ready`."""
        self._pool.wait_until_ready()

    def now(self) -> float:
        """Seconds of simulated time since this pool was made."""
        return self._now
