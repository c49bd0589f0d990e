"""Ray actors that run clients' turns: the only file that imports ray.

Start at `RayPool`. It keeps the promise of `ClientPool` (same jobs in, same results out, bit for bit on CPU, as
`LocalPool`) and decides only *where* the work runs. Fewer actors than clients is the normal case: an actor takes the
next job when it is free. What an actor does with a job is in `worker`, how many of them fit is in `placement`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from lightning_pfl.errors import FederationError
from lightning_pfl.federation.client import Client
from lightning_pfl.federation.jobs import Failure, Job, JobResult
from lightning_pfl.federation.pickling import dump, load
from lightning_pfl.federation.pools.base import ClientPool
from lightning_pfl.federation.pools.isolation import ProcessSettings
from lightning_pfl.federation.pools.placement import Demand, Placement, check_fit
from lightning_pfl.federation.pools.worker import Outcome, WorkerSetup, machine, versions
from lightning_pfl.federation.snapshot import Snapshot
from lightning_pfl.federation.tensor_file import TensorFileRef

__all__ = ["RayPool"]

_LOG = logging.getLogger(__name__)
_PIECE = 64 * 2**20  # bytes of a tensor file that travel to another machine in one object
_PATIENCE = 30.0  # seconds without news before the log says what is waited for


@dataclass(eq=False)
class _Turn:
    """A job on its way to a result."""

    job: Job
    deaths: int = 0


@dataclass(eq=False)
class _Slot:
    """One actor and what it is doing: `answer` is what will come, `turn` what it is about (None while it warms up)."""

    actor: Any
    demand: Demand
    node: str
    answer: Any = None
    turn: _Turn | None = None


@final
class RayPool(ClientPool):
    """Runs turns in Ray actors, on this machine or on a cluster.

    Each actor is as big as what its clients ask for, and clients that ask for the same share actors. A backbone is in
    memory once per machine. An actor that dies is replaced and its job run again, with the same result.

    Ray is connected to when the pool starts, unless the program did so already; then it is left running at the end,
    too. Initialise Ray yourself when several ``trainer.fit`` and ``trainer.test`` follow each other: it saves its
    start (5 to 10 seconds) each time.

    Args:
        address: of a cluster. None: the one in the environment variable ``RAY_ADDRESS``, else one that ``ray start``
            started on this machine, else Ray is started here. "local" always starts one here.
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
        self._reset()

    def _reset(self) -> None:
        self._slots: list[_Slot] = []
        self._waiting: dict[Demand, deque[_Turn]] = {}
        self._demands: dict[str, Demand] = {}
        self._files: dict[str, TensorFileRef] = {}
        self._pieces: dict[str, list[Any]] = {}
        self._copies: set[str] = set()  # nodes that may hold copies of files
        self._originals: dict[str, Snapshot] = {}
        self._snapshots: dict[str, Any] = {}  # in Ray's object store
        self._placement = Placement({}, limit=None)
        self._failed_starts = 0
        self._told_versions = False
        self._setup: dict[str, Any] = {}

    def start(self, clients: Sequence[Client], snapshots: Mapping[str, Snapshot]) -> None:
        """Connect to Ray, check that each client fits, and let actors warm up. See `ClientPool.start`."""
        import ray

        self.close()
        try:
            if not ray.is_initialized():
                self._owns_ray = True  # before it is done, as it may be interrupted
                _connect(self._init)
            self._prepare(clients, snapshots)
        except BaseException:
            self.close()
            raise

    def _prepare(self, clients: Sequence[Client], snapshots: Mapping[str, Snapshot]) -> None:
        import ray

        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        check_fit(clients, nodes)
        self._placement = Placement(nodes, limit=self._num_actors)
        self._demands = {client.id: Demand.of(client) for client in clients}
        files = [snapshot.file for snapshot in snapshots.values() if snapshot.file is not None]
        self._files = {file.path: file for file in sorted(files, key=lambda file: file.nbytes)}  # per path the longest
        self._originals = dict(snapshots)
        self._snapshots = {name: ray.put(snapshot) for name, snapshot in snapshots.items()}
        self._setup = {
            "settings": ProcessSettings.capture(),
            "folder": os.getcwd(),
            "machine": machine(),
            "run": uuid.uuid4().hex[:12],
        }
        self._start_actors(num_cpus=sum(node.get("CPU", 0.0) for node in nodes.values()))

    def close(self) -> None:
        """Kill the actors; shut Ray down if this pool started it. See `ClientPool.close`."""
        slots, copies = self._slots, self._copies
        self._reset()
        if not slots and not self._owns_ray:
            return
        import ray

        try:
            if copies and ray.is_initialized():
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.get([slot.actor.forget.remote() for slot in slots if slot.node in copies], timeout=5)
        finally:
            for slot in slots:
                _kill(slot.actor)
            if self._owns_ray:
                self._owns_ray = False
                ray.shutdown()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hand them to the next free actors of their size. See `ClientPool.submit`."""
        if jobs and not self._demands:
            raise RuntimeError(
                "This `RayPool` is not running: call `start` before `submit`, and not `close` in between."
            )
        for job in jobs:
            self._waiting.setdefault(self._demands[job.assignment.client_id], deque()).append(_Turn(job))
        self._assign()

    def next(self, timeout: float | None = None) -> JobResult | None:
        """Wait for the next result. See `ClientPool.next`."""
        start = time.monotonic()
        while any(self._waiting.values()) or any(slot.turn is not None for slot in self._slots):
            self._assign()
            if (turn := self._homeless()) is not None:
                trace = f"No node is left that has what it asks for, {self._demands[turn.job.assignment.client_id]}."
                return JobResult(turn.job.assignment.client_id, failure=Failure(trace, lost=True))
            answers = {slot.answer: slot for slot in self._slots if slot.answer is not None}
            assert answers, "every client fits on some node, so somebody is at work or starting"
            left = _PATIENCE if timeout is None else max(0.0, start + timeout - time.monotonic())
            done = _wait(list(answers), timeout=min(_PATIENCE, left))
            if not done and left <= _PATIENCE and timeout is not None:
                return None
            if not done:
                self._say_what_is_waited_for(time.monotonic() - start)
                continue
            slot = answers[done[0]]
            turn, slot.turn, slot.answer = slot.turn, None, None
            result = self._take(done[0], slot, turn)
            if result is not None and turn is not None:
                self._assign()  # before the caller gets to work on this result
                return result
            if turn is not None:
                self._waiting[slot.demand].appendleft(turn)
        return None

    def cancel(self, client_ids: Collection[str]) -> None:
        """Kill the actors that run them and start others. See `ClientPool.cancel`."""
        for demand, queue in self._waiting.items():
            self._waiting[demand] = deque(turn for turn in queue if turn.job.assignment.client_id not in client_ids)
        for slot in list(self._slots):
            if slot.turn is not None and slot.turn.job.assignment.client_id in client_ids:
                self._drop(slot)
                self._start_actor(slot.demand)

    def wait_until_ready(self) -> None:
        """Wait for actors that warm up. See `ClientPool.wait_until_ready`."""
        while starting := {slot.answer: slot for slot in self._slots if slot.answer is not None and slot.turn is None}:
            done = _wait(list(starting), timeout=_PATIENCE)
            if not done:
                self._say_what_is_waited_for(_PATIENCE)
                continue
            slot = starting[done[0]]
            slot.answer = None
            self._take(done[0], slot, None)

    def _take(self, answer: Any, slot: _Slot, turn: _Turn | None) -> JobResult | None:
        """Read an actor's answer and do what it calls for; None if it is no result."""
        import ray

        try:
            outcome: Outcome = ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ray.exceptions.ObjectLostError):
                _LOG.warning(
                    "Ray's object store has lost what turns start from (%s). Sending it again.", _line(error.cause)
                )
                self._pieces.clear()
                self._snapshots |= {name: ray.put(snapshot) for name, snapshot in self._originals.items()}
                self._replace(slot, error, was_starting=turn is None)
                return None if turn is None else self._count_death(turn, str(error))
            if turn is None:
                raise FederationError(f"An actor could not get ready. Its own traceback:\n{error}") from error
            return JobResult(turn.job.assignment.client_id, failure=Failure(str(error)))
        except ray.exceptions.RayError as error:
            self._replace(slot, error, was_starting=turn is None)
            return None if turn is None else self._count_death(turn, str(error))
        if outcome.missing is not None:
            slot.answer = self._send(self._files[outcome.missing.path], slot)
        elif outcome.result is not None:
            result: JobResult = load(outcome.result)
            if result.failure is not None and result.failure.lost and turn is not None:  # as its device is gone
                self._drop(slot)
                self._start_actor(slot.demand)
                return self._count_death(turn, result.failure.trace)
            return result
        else:
            self._failed_starts = 0
            if outcome.versions != versions() and not self._told_versions:
                self._told_versions = True
                _LOG.warning("Ray: an actor has %s, this process %s: results may differ.", outcome.versions, versions())
            ready = sum(other.answer is None or other.turn is not None for other in self._slots)
            _LOG.info("Ray: %d of %d actors ready.", ready, len(self._slots))
        return None

    def _count_death(self, turn: _Turn, why: str) -> JobResult | None:
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
        for slot in self._slots:
            if slot.answer is None and (queue := self._waiting.get(slot.demand)):
                slot.turn = queue.popleft()
                job = slot.turn.job
                slot.answer = slot.actor.run.remote(dump(job), job.snapshot, job.seed, job.num_threads)
        for demand, queue in self._waiting.items():
            actors = sum(slot.demand == demand for slot in self._slots)
            while actors < len(queue) and (demand.amounts or actors == 0):
                idle = next((slot for slot in self._slots if slot.answer is None), None)
                if self._start_actor(demand):
                    actors += 1
                elif actors == 0 and idle is not None:
                    _LOG.warning("Ray: %s needs the room of %s, whose clients wait for it.", demand, idle.demand)
                    self._drop(idle)
                else:
                    break  # of no use, or a busy one will be done some time

    def _start_actors(self, num_cpus: float) -> None:
        """As many as fit and have something to do, in turn over the sizes."""
        wanted = Counter(self._demands.values())
        for demand in wanted:
            if not demand.amounts:  # any number would fit
                wanted[demand] = min(wanted[demand], max(1, int(num_cpus)))
        growing = True
        while growing:
            growing = False
            for demand in wanted:
                if wanted[demand] and self._start_actor(demand):
                    wanted[demand] -= 1
                    growing = True
        _LOG.info("Ray: warming up %d actors for %d clients.", len(self._slots), len(self._demands))

    def _start_actor(self, demand: Demand) -> bool:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node = self._placement.take(demand)
        if node is None:
            return False
        setup = WorkerSetup(**self._setup, hide_gpus=demand.num_gpus == 0)
        options = {
            "num_cpus": demand.num_cpus,
            "num_gpus": demand.num_gpus,
            "resources": dict(demand.resources),
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True),
            "max_restarts": 0,  # a fresh actor takes the job over, so that each try is counted and told
        }
        actor = ray.remote(_actor_class()).options(**options).remote(sys.path, pickle.dumps(setup), self._snapshots)
        slot = _Slot(actor, demand, node)
        slot.answer = actor.warm_up.remote(next(iter(self._snapshots), None))
        self._slots.append(slot)
        return True

    def _homeless(self) -> _Turn | None:
        """A job that no node can run any more; None when there is none."""
        for demand, queue in self._waiting.items():
            if queue and not self._placement.ever_fits(demand):
                return queue.popleft()
        return None

    def _forget_lost_nodes(self) -> None:
        """Strike out nodes that are gone, and actors that would start there."""
        import ray

        gone = self._placement.forget_all_but([node["NodeID"] for node in ray.nodes() if node["Alive"]])
        if gone:
            _LOG.warning("Ray: %d nodes are gone: %s.", len(gone), ", ".join(sorted(node[:12] for node in gone)))
        for slot in [slot for slot in self._slots if slot.node in gone and slot.turn is None]:
            self._drop(slot)

    def _replace(self, slot: _Slot, error: Exception, *, was_starting: bool) -> None:
        """Start another actor for one that died, unless none ever gets ready."""
        self._forget_lost_nodes()
        self._failed_starts += was_starting
        if self._failed_starts > self._max_retries + len(self._slots):
            raise FederationError(
                f"{self._failed_starts} actors died in a row before they were ready. The last one: {error}\n"
                "Ray's log files say more; too little memory for so many processes is a usual reason: set `num_actors`."
            ) from error
        self._drop(slot)
        self._start_actor(slot.demand)

    def _drop(self, slot: _Slot) -> None:
        if slot not in self._slots:
            return
        self._slots.remove(slot)
        self._placement.give_back(slot.node, slot.demand)
        _kill(slot.actor)

    def _send(self, file: TensorFileRef, slot: _Slot) -> Any:
        """Send a tensor file to an actor on another machine; the pieces are shared by all machines."""
        import ray

        if file.path not in self._pieces:
            _LOG.info("Ray: sending %.0f MiB of tensors to other machines.", file.nbytes / 2**20)
            self._pieces[file.path] = []
            with open(file.path, "rb") as stream:
                for start in range(0, file.nbytes, _PIECE):
                    self._pieces[file.path].append(ray.put(stream.read(min(_PIECE, file.nbytes - start))))
        self._copies.add(slot.node)
        return slot.actor.receive.remote(file, self._pieces[file.path])

    def _say_what_is_waited_for(self, seconds: float) -> None:
        import ray

        busy = [slot.turn.job.assignment.client_id for slot in self._slots if slot.turn is not None]
        if busy:
            _LOG.info("Ray: no news for %.0f s; at work: %s.", seconds, ", ".join(busy))
        self._forget_lost_nodes()
        if busy:
            return
        free = ray.available_resources()
        _LOG.warning("Ray: %d actors have not started for %.0f s. Free: %s.", len(self._slots), seconds, free)


def _line(why: object) -> str:
    """The line of a message that says most: a traceback's last, else the first."""
    lines = str(why).strip().splitlines() or [type(why).__name__]
    return lines[-1 if lines[0].startswith("Traceback") else 0]


def _actor_class() -> type:
    """The actor, defined here so that Ray ships it whole: it can start before this package can be imported."""

    class FederatedClients:
        def __init__(self, path: list[str], setup: bytes, snapshots: dict[str, Any]) -> None:
            sys.path.extend(folder for folder in path if folder not in sys.path)
            self._setup, self._snapshots = setup, snapshots

        def warm_up(self, snapshot: str | None) -> Any:
            import ray

            from lightning_pfl.federation.pools.worker import Worker  # takes seconds, so not in the constructor

            self._worker = Worker(pickle.loads(self._setup), lambda name: ray.get(self._snapshots[name]))
            return self._worker.warm_up(snapshot)

        def receive(self, file: Any, pieces: list[Any]) -> Any:
            import ray

            return self._worker.receive(file, (ray.get(piece) for piece in pieces))

        def run(self, job: Any, snapshot: str, seed: int, num_threads: int) -> Any:
            return self._worker.run(job, snapshot, seed, num_threads)

        def forget(self) -> None:
            self._worker.forget()

    return FederatedClients


def _connect(arguments: Mapping[str, Any]) -> None:
    import ray

    _LOG.info("Ray: connecting (starting it takes some seconds).")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    quiet = "RAY_USAGE_STATS_ENABLED" not in os.environ
    if quiet:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        ray.init(**arguments)
    finally:
        if quiet:
            del os.environ["RAY_USAGE_STATS_ENABLED"]
        for number, handler in handlers.items():  # ray.init replaces what the user or Lightning set for SIGTERM
            if signal.getsignal(number) is not handler:
                with contextlib.suppress(ValueError):  # not the main thread
                    signal.signal(number, handler)


def _wait(answers: list[Any], timeout: float) -> list[Any]:
    import ray

    try:
        done: list[Any] = ray.wait(answers, num_returns=1, timeout=timeout)[0]
    except SystemError as error:  # what a signal handler raises meanwhile (for SIGTERM, say) comes out of Ray as this
        raise error.__cause__ or error from None
    return done


def _kill(actor: Any) -> None:
    import ray

    with contextlib.suppress(Exception):
        ray.kill(actor)
