"""Ray as `RayPool` uses it: the only file that imports ray.

Start at `connect`. Ray has many errors; what comes out of `read` are the three that call for different things: the
actor is gone, the object store has lost something, or the actor's own code raised.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_pfl.federation.pools.placement import Demand
from lightning_pfl.federation.pools.worker import WorkerSetup

__all__ = [
    "ActorDiedError",
    "ActorRaisedError",
    "ObjectsLostError",
    "connect",
    "disconnect",
    "first_of",
    "forget_copies",
    "free",
    "is_connected",
    "kill",
    "nodes",
    "put",
    "read",
    "start_actor",
]

_LOG = logging.getLogger(__name__)


class ActorDiedError(Exception):
    """An actor is gone, or its node: what it was to answer will never come."""


class ActorRaisedError(Exception):
    """The code of an actor raised; the text ends with its traceback."""


class ObjectsLostError(Exception):
    """The object store has lost what an actor needed.

    Args:
        trace: where the actor missed it.
        what: was lost, in words.
    """

    def __init__(self, trace: str, what: str) -> None:
        super().__init__(trace)
        self.what = what


def connect(arguments: Mapping[str, Any]) -> None:
    """Connect to a cluster or start one, as ``ray.init`` does; usage reports stay off unless they were asked for."""
    import ray

    _LOG.info("Ray: connecting (starting it takes some seconds).")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    quiet = "RAY_USAGE_STATS_ENABLED" not in os.environ
    if quiet:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    address = arguments.get("address") or ("local" if _last_cluster_is_dead(arguments.get("_temp_dir")) else None)
    try:
        ray.init(**{**arguments, "address": address})
    finally:
        if quiet:
            del os.environ["RAY_USAGE_STATS_ENABLED"]
        for number, handler in handlers.items():  # ray.init replaces what the user or Lightning set for SIGTERM
            if signal.getsignal(number) is not handler:
                with contextlib.suppress(ValueError):  # not the main thread
                    signal.signal(number, handler)


def _last_cluster_is_dead(temp_dir: str | None) -> bool:
    """Whether ``ray.init`` would wait, for minutes and in vain, for a cluster that was killed.

    Ray keeps the address of the machine's last cluster in a file, takes it out when the cluster ends in peace, and
    believes it otherwise. Nobody who listens there is enough to know better.
    """
    from ray._private.utils import read_ray_address  # there is no public way to ask

    if os.environ.get("RAY_ADDRESS"):
        return False
    host, _, port = (read_ray_address(temp_dir) or "").rpartition(":")
    if not port.isdigit():
        return False
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return True
    return False


def is_connected() -> bool:
    """Whether this process is part of a cluster."""
    import ray

    return bool(ray.is_initialized())


def disconnect() -> None:
    """Leave the cluster, and end it if this process started it."""
    import ray

    ray.shutdown()


def nodes() -> dict[str, Mapping[str, float]]:
    """By name of the nodes that are alive, what they have in total."""
    import ray

    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def free() -> Mapping[str, float]:
    """What nobody uses at the moment, in the whole cluster."""
    import ray

    resources: Mapping[str, float] = ray.available_resources()
    return resources


def put(value: Any) -> Any:
    """A reference to a value that lies in the object store from now on."""
    import ray

    return ray.put(value)


def start_actor(demand: Demand, node: str, setup: WorkerSetup, snapshots: Mapping[str, Any]) -> Any:
    """Start an actor; it can be called at once, and answers when it is there.

    Args:
        demand: how big it is.
        node: where to start it, if it is still there.
        setup: what its worker is told.
        snapshots: by name, references to what turns start from.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options = {
        "num_cpus": demand.num_cpus,
        "num_gpus": demand.num_gpus,
        "resources": dict(demand.resources),
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True),
        "max_restarts": 0,  # a fresh actor takes the job over, so that each try is counted and told
    }
    return ray.remote(_actor_class()).options(**options).remote(sys.path, pickle.dumps(setup), dict(snapshots))


def first_of(answers: Sequence[Any], timeout: float) -> Any | None:
    """Wait until one of some answers is there.

    Args:
        answers: what calls of actors gave.
        timeout: seconds.

    Returns:
        The answer, to be read with `read`; None: the time is over.
    """
    import ray

    try:
        done: list[Any] = ray.wait(list(answers), num_returns=1, timeout=timeout)[0]
    except SystemError as error:  # what a signal handler raises meanwhile (for SIGTERM, say) comes out of Ray as this
        raise error.__cause__ or error from None
    return done[0] if done else None


def read(answer: Any) -> Any:
    """What an actor answered.

    Raises:
        ActorDiedError, ActorRaisedError, ObjectsLostError: as they say.
    """
    import ray

    try:
        return ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ray.exceptions.ObjectLostError):
            raise ObjectsLostError(str(error), str(error.cause)) from error
        raise ActorRaisedError(str(error)) from error
    except ray.exceptions.RayError as error:
        raise ActorDiedError(str(error) or type(error).__name__) from error


def kill(actor: Any) -> None:
    """End an actor in the middle of whatever it does; nothing happens if it is gone already."""
    import ray

    with contextlib.suppress(Exception):
        ray.kill(actor)


def forget_copies(actors: Iterable[Any], timeout: float) -> None:
    """Let actors remove what they have written to the disks of their machines.

    Args:
        actors: idle ones are reached, busy and dead ones perhaps not.
        timeout: seconds to wait for all of them.
    """
    import ray

    if ray.is_initialized():
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get([actor.forget.remote() for actor in actors], timeout=timeout)


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
