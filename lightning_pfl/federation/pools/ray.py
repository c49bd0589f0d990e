"""`RayPool`: clients' turns in Ray actors, on one machine or many.

Start at `RayPool`. It keeps the promise of `ClientPool` (same jobs in, same results out, bit for bit on CPU, as
`LocalPool`) and decides only *where* the work runs. Fewer actors than clients is the normal case: an actor takes the
next job when it is free. Which actors there are is in `actors`, what they are sent in `parcels`, what an actor does
with a job in `worker`, how many of them fit in `placement`; Ray itself is touched in `cluster` alone.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any, final

from lightning.pytorch.trainer.states import TrainerFn

from lightning_pfl.errors import FederationError
from lightning_pfl.federation.client import Client
from lightning_pfl.federation.jobs import Failure, Job, JobResult
from lightning_pfl.federation.pickling import load
from lightning_pfl.federation.pools import cluster
from lightning_pfl.federation.pools.actors import Actors, Slot, Turn
from lightning_pfl.federation.pools.base import ClientPool
from lightning_pfl.federation.pools.isolation import ProcessSettings
from lightning_pfl.federation.pools.parcels import Parcels
from lightning_pfl.federation.pools.placement import Demand, Placement, check_fit, longest_first
from lightning_pfl.federation.pools.worker import Outcome, machine, versions
from lightning_pfl.federation.snapshot import Snapshot

__all__ = ["RayPool"]

_LOG = logging.getLogger(__name__)
_PATIENCE = 30.0  # seconds without news before the log says what is waited for


@final
class RayPool(ClientPool):
    """Runs turns in Ray actors, on this machine or on a cluster.

    Each actor is as big as what its clients ask for, and clients that ask for the same share actors. A backbone is in
    memory once per machine. An actor that dies is replaced and its job run again, with the same result. A node that
    joins the cluster is used from the next round on. Clients whose last turn took longest are run first, so that no
    long turn begins when the others are done.

    Ray is connected to when the pool starts, unless the program did so already; then it is left running at the end,
    too. Initialise Ray yourself when several ``trainer.fit`` and ``trainer.test`` follow each other: it saves its
    start (5 to 10 seconds) each time.

    Args:
        address: of a cluster. None: the one in the environment variable ``RAY_ADDRESS``, else one that ``ray start``
            started on this machine and that still answers, else Ray is started here. "local" always starts one here.
        num_actors: at most so many at once. None: as many as fit, but not more than clients.
        max_retries: how often a job is run again whose actor died, before the client counts as failed.
        log_to_driver: whether what clients print appears here. Ray's own log files have it in any case.
        init: further arguments of ``ray.init``, where this pool calls it. Ray's dashboard and usage reports are off
            unless this or Ray's own environment variables turn them on.

    Raises:
        ValueError: `num_actors` or `max_retries` out of range.

    Example:
        >>> pool = RayPool(num_actors=2)
        >>> pool.close()  # nothing was started
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        num_actors: int | None = None,
        max_retries: int = 2,
        log_to_driver: bool = False,
        init: Mapping[str, Any] | None = None,
    ) -> None:
        if num_actors is not None and num_actors < 1:
            raise ValueError(f"`num_actors` must be at least 1, but is {num_actors}.")
        if max_retries < 0:
            raise ValueError(f"`max_retries` must not be negative, but is {max_retries}.")
        self._num_actors = num_actors
        self._max_retries = max_retries
        self._init = {"include_dashboard": False, "logging_level": logging.WARNING} | dict(init or {})
        self._init |= {"address": address, "log_to_driver": log_to_driver}
        self._owns_ray = False
        self._seconds: dict[str, float] = {}  # that clients' last turns took
        self._reset()

    def _reset(self) -> None:
        self._waiting: dict[Demand, deque[Turn]] = {}
        self._demands: dict[str, Demand] = {}
        self._parcels = Parcels({})
        self._actors = Actors(Placement({}, limit=None), self._parcels, setup={}, max_failed_starts=0)
        self._told_versions = False

    def start(self, clients: Sequence[Client], snapshots: Mapping[str, Snapshot]) -> None:
        """Connect to Ray, check that each client fits, and let actors warm up. See `ClientPool.start`."""
        self._end_actors()
        try:
            self._connect()
            self._prepare(clients, snapshots)
        except BaseException:
            self.close()
            raise

    def look(self, clients: Sequence[Client]) -> Placement:
        """Connect to Ray, and check that each client fits. See `ClientPool.look`."""
        try:
            self._connect()
            nodes = cluster.nodes()
            check_fit(clients, nodes)
        except BaseException:
            self.close()
            raise
        return Placement(nodes, limit=self._num_actors)

    def at_work(self) -> tuple[int, int]:
        """Actors. See `ClientPool.at_work`."""
        slots = self._actors.slots
        return sum(slot.turn is not None for slot in slots), len(slots)

    def _connect(self) -> None:
        if not cluster.is_connected():
            self._owns_ray = True  # before it is done, as it may be interrupted
            cluster.connect(self._init)

    def _prepare(self, clients: Sequence[Client], snapshots: Mapping[str, Snapshot]) -> None:
        nodes = cluster.nodes()
        check_fit(clients, nodes)
        self._demands = {client.id: Demand.of(client) for client in clients}
        self._parcels = Parcels(snapshots)
        setup = {
            "settings": ProcessSettings.capture(),
            "folder": os.getcwd(),
            "machine": machine(),
            "run": uuid.uuid4().hex[:12],
        }
        self._actors = Actors(
            Placement(nodes, limit=self._num_actors),
            self._parcels,
            setup=setup,
            max_failed_starts=self._max_retries,
        )
        num_cpus = sum(node.get("CPU", 0.0) for node in nodes.values())
        self._actors.start_all(self._demands.values(), num_cpus)

    def close(self) -> None:
        """Kill the actors; shut Ray down if this pool started it. See `ClientPool.close`."""
        try:
            self._end_actors()
        finally:
            if self._owns_ray:
                self._owns_ray = False
                cluster.disconnect()

    def _end_actors(self) -> None:
        actors = self._actors
        self._reset()
        actors.close()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hand them to the next free actors of their size. See `ClientPool.submit`."""
        if jobs and not self._demands:
            raise RuntimeError(
                "This `RayPool` is not running: call `start` before `submit`, and not `close` in between."
            )
        if jobs:
            self._actors.meet_new_nodes()
        by_client = {job.assignment.client_id: job for job in jobs}
        for client_id in longest_first(list(by_client), self._seconds):
            self._waiting.setdefault(self._demands[client_id], deque()).append(Turn(by_client[client_id]))
        self._assign()

    def next(self, timeout: float | None = None) -> JobResult | None:
        """Wait for the next result. See `ClientPool.next`."""
        start = time.monotonic()
        while any(self._waiting.values()) or any(slot.turn is not None for slot in self._actors.slots):
            self._assign()
            if (turn := self._homeless()) is not None:
                trace = f"No node is left that has what it asks for, {self._demands[turn.job.assignment.client_id]}."
                return JobResult(turn.job.assignment.client_id, failure=Failure(trace, lost=True))
            answers = {slot.answer: slot for slot in self._actors.slots if slot.answer is not None}
            assert answers, "every client fits on some node, so somebody is at work or starting"
            left = _PATIENCE if timeout is None else max(0.0, start + timeout - time.monotonic())
            done = cluster.first_of(list(answers), timeout=min(_PATIENCE, left))
            if done is None and left <= _PATIENCE and timeout is not None:
                return None
            if done is None:
                self._say_what_is_waited_for(time.monotonic() - start)
                continue
            slot = answers[done]
            turn, slot.turn, slot.answer = slot.turn, None, None
            result = self._take(done, slot, turn)
            if result is not None and turn is not None:
                if turn.job.stage is TrainerFn.FITTING and result.failure is None:
                    self._seconds[result.client_id] = result.seconds
                self._assign()  # before the caller gets to work on this result
                return result
            if turn is not None:
                self._waiting[slot.demand].appendleft(turn)
        return None

    def cancel(self, client_ids: Collection[str]) -> None:
        """Kill the actors that run them and start others. See `ClientPool.cancel`."""
        for demand, queue in self._waiting.items():
            self._waiting[demand] = deque(turn for turn in queue if turn.job.assignment.client_id not in client_ids)
        for slot in list(self._actors.slots):
            if slot.turn is not None and slot.turn.job.assignment.client_id in client_ids:
                self._actors.exchange(slot)

    def wait_until_ready(self) -> None:
        """Wait for actors that warm up. See `ClientPool.wait_until_ready`."""
        while starting := {
            slot.answer: slot for slot in self._actors.slots if slot.answer is not None and slot.turn is None
        }:
            done = cluster.first_of(list(starting), timeout=_PATIENCE)
            if done is None:
                self._say_what_is_waited_for(_PATIENCE)
                continue
            slot = starting[done]
            slot.answer = None
            self._take(done, slot, None)

    def _take(self, answer: Any, slot: Slot, turn: Turn | None) -> JobResult | None:
        """Read an actor's answer and do what it calls for; None if it is no result."""
        try:
            outcome: Outcome = cluster.read(answer)
        except cluster.ObjectsLostError as error:
            _LOG.warning("Ray's object store has lost what turns start from (%s). Sending it again.", _line(error.what))
            self._parcels.put_again()
            self._actors.replace(slot, error, was_starting=turn is None)
            return None if turn is None else self._count_death(turn, str(error))
        except cluster.ActorRaisedError as error:
            if turn is None:
                raise FederationError(f"An actor could not get ready. Its own traceback:\n{error}") from error
            return JobResult(turn.job.assignment.client_id, failure=Failure(str(error)))
        except cluster.ActorDiedError as error:
            self._actors.replace(slot, error, was_starting=turn is None)
            return None if turn is None else self._count_death(turn, str(error))
        if outcome.missing is not None:
            self._actors.send_file(outcome.missing.path, slot)
        elif outcome.result is not None:
            result: JobResult = load(outcome.result)
            if result.failure is not None and result.failure.lost and turn is not None:  # as its device is gone
                self._actors.exchange(slot)
                return self._count_death(turn, result.failure.trace)
            return result
        else:
            self._actors.is_ready()
            if outcome.versions != versions() and not self._told_versions:
                self._told_versions = True
                _LOG.warning("Ray: an actor has %s, this process %s: results may differ.", outcome.versions, versions())
        return None

    def _count_death(self, turn: Turn, why: str) -> JobResult | None:
        """Say that the actor of a job died, or its device; the failure if that happened too often."""
        turn.deaths += 1
        client_id = turn.job.assignment.client_id
        if turn.deaths <= self._max_retries:
            _LOG.warning(
                "The actor that ran client `%s` in round %d died (%s). Running the client again, try %d of %d.",
                *(client_id, turn.job.assignment.round, _line(why)),
                *(turn.deaths + 1, self._max_retries + 1),
            )
            return None
        trace = f"The actor that ran it died, {turn.deaths} times in a row. The last time: {why}"
        return JobResult(client_id, failure=Failure(trace, lost=True))

    def _assign(self) -> None:
        """Give free actors the next job of their size; where a size has no actor at all, make room for one."""
        slots = self._actors.slots
        for slot in slots:
            if slot.answer is None and (queue := self._waiting.get(slot.demand)):
                slot.run(queue.popleft())
        for demand, queue in self._waiting.items():
            mine = [slot.turn is None for slot in slots if slot.demand == demand]
            count, coming = len(mine), sum(mine)  # those that are not at work are starting, as there are jobs for all
            while coming < len(queue) and (demand.amounts or count == 0):
                idle = next((slot for slot in slots if slot.answer is None), None)
                if self._actors.start(demand):
                    count, coming = count + 1, coming + 1
                elif count == 0 and idle is not None:
                    _LOG.warning("Ray: %s needs the room of %s, whose clients wait for it.", demand, idle.demand)
                    self._actors.drop(idle)
                else:
                    break  # of no use, or a busy one will be done some time

    def _homeless(self) -> Turn | None:
        """A job that no node can run any more; None when there is none."""
        for demand, queue in self._waiting.items():
            if queue and not self._actors.ever_fits(demand):
                return queue.popleft()
        return None

    def _say_what_is_waited_for(self, seconds: float) -> None:
        busy = [slot.turn.job.assignment.client_id for slot in self._actors.slots if slot.turn is not None]
        if busy:
            _LOG.info("Ray: no news for %.0f s; at work: %s.", seconds, ", ".join(busy))
        self._actors.forget_lost_nodes()
        if busy:
            return
        count = len(self._actors.slots)
        _LOG.warning("Ray: %d actors have not started for %.0f s. Free: %s.", count, seconds, cluster.free())


def _line(why: str) -> str:
    """The line of a message that says most: a traceback's last, else the first."""
    lines = why.strip().splitlines() or ["no reason given"]
    return lines[-1 if lines[0].startswith("Traceback") else 0]
