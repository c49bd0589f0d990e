"""`Actors`: which actors there are, where, and what each of them is doing. It starts, replaces and ends them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

from lightning_pfl.errors import FederationError
from lightning_pfl.federation.jobs import Job
from lightning_pfl.federation.pickling import dump
from lightning_pfl.federation.pools import cluster
from lightning_pfl.federation.pools.parcels import Parcels
from lightning_pfl.federation.pools.placement import Demand, Placement
from lightning_pfl.federation.pools.worker import WorkerSetup

__all__ = ["Actors", "Slot", "Turn"]

_LOG = logging.getLogger(__name__)
_FORGETTING = 5.0  # seconds for actors to remove what they have written to their machines' disks


@dataclass(eq=False)
class Turn:
    """A job on its way to a result, and how many actors have died of it."""

    job: Job
    deaths: int = 0


@dataclass(eq=False)
class Slot:
    """One actor and what it is doing: `answer` is what will come, `turn` what it is about (None while it warms up)."""

    actor: Any
    demand: Demand
    node: str
    answer: Any = None
    turn: Turn | None = None

    def run(self, turn: Turn) -> None:
        """Let it run a job; the answer comes later."""
        job, self.turn = turn.job, turn
        self.answer = self.actor.run.remote(dump(job), job.snapshot, job.seed, job.num_threads)


@final
class Actors:
    """The actors of one run.

    Args:
        placement: of the cluster's nodes.
        parcels: what actors are sent.
        setup: what every worker is told, but for whether it may see GPUs.
        max_failed_starts: how many may die before they are ready, beyond one per actor.

    Attributes:
        slots: one per actor, in the order of their start.
    """

    def __init__(
        self, placement: Placement, parcels: Parcels, *, setup: Mapping[str, Any], max_failed_starts: int
    ) -> None:
        self._placement = placement
        self._parcels = parcels
        self._setup = dict(setup)
        self._max_failed_starts = max_failed_starts
        self._failed_starts = 0
        self.slots: list[Slot] = []

    def start_all(self, demands: Iterable[Demand], num_cpus: float) -> None:
        """As many as fit and have something to do, in turn over the sizes.

        Args:
            demands: one per client.
            num_cpus: of the cluster; of actors that take no resources, any number would fit.
        """
        wanted = Counter(demands)
        num_clients = wanted.total()
        for demand in wanted:
            if not demand.amounts:
                wanted[demand] = min(wanted[demand], max(1, int(num_cpus)))
        growing = True
        while growing:
            growing = False
            for demand in wanted:
                if wanted[demand] and self.start(demand):
                    wanted[demand] -= 1
                    growing = True
        _LOG.info("Ray: warming up %d actors for %d clients.", len(self.slots), num_clients)

    def start(self, demand: Demand) -> bool:
        """Start one and let it warm up; whether there is room."""
        node = self._placement.take(demand)
        if node is None:
            return False
        setup = WorkerSetup(**self._setup, hide_gpus=demand.num_gpus == 0)
        snapshots = self._parcels.snapshots
        slot = Slot(cluster.start_actor(demand, node, setup, snapshots), demand, node)
        slot.answer = slot.actor.warm_up.remote(next(iter(snapshots), None))
        self.slots.append(slot)
        return True

    def send_file(self, path: str, slot: Slot) -> None:
        """Send a tensor file to an actor on another machine; what it answers then is about that."""
        slot.answer = slot.actor.receive.remote(*self._parcels.file(path, slot.node))

    def is_ready(self) -> None:
        """Take note that one has got ready."""
        self._failed_starts = 0
        ready = sum(slot.answer is None or slot.turn is not None for slot in self.slots)
        _LOG.info("Ray: %d of %d actors ready.", ready, len(self.slots))

    def replace(self, slot: Slot, error: Exception, *, was_starting: bool) -> None:
        """Start another actor for one that died.

        Raises:
            FederationError: none ever gets ready.
        """
        self.forget_lost_nodes()
        self._failed_starts += was_starting
        if self._failed_starts > self._max_failed_starts + len(self.slots):
            raise FederationError(
                f"{self._failed_starts} actors died in a row before they were ready. The last one: {error}\n"
                "Ray's log files say more; too little memory for so many processes is a usual reason: set `num_actors`."
            ) from error
        self.exchange(slot)

    def exchange(self, slot: Slot) -> None:
        """End an actor and start another of its size, if there is room."""
        self.drop(slot)
        self.start(slot.demand)

    def drop(self, slot: Slot) -> None:
        """End an actor, whatever it does."""
        if slot in self.slots:
            self.slots.remove(slot)
            self._placement.give_back(slot.node, slot.demand)
            cluster.kill(slot.actor)

    def ever_fits(self, demand: Demand) -> bool:
        """Whether some node that is left could hold such an actor."""
        return self._placement.ever_fits(demand)

    def forget_lost_nodes(self) -> None:
        """Strike out nodes that are gone, and actors that would start there."""
        gone = self._placement.forget_all_but(cluster.nodes())
        if gone:
            _LOG.warning("Ray: %d nodes are gone: %s.", len(gone), ", ".join(sorted(node[:12] for node in gone)))
        for slot in [slot for slot in self.slots if slot.node in gone and slot.turn is None]:
            self.drop(slot)

    def meet_new_nodes(self) -> None:
        """Take in nodes that have joined the cluster."""
        if new := self._placement.welcome(cluster.nodes()):
            _LOG.info("Ray: %d nodes have joined: %s.", len(new), ", ".join(sorted(node[:12] for node in new)))

    def close(self) -> None:
        """End all of them, once they have removed what they have written to disks of other machines."""
        slots, self.slots = self.slots, []
        try:
            if receivers := [slot.actor for slot in slots if slot.node in self._parcels.receivers]:
                cluster.forget_copies(receivers, _FORGETTING)
        finally:
            for slot in slots:
                cluster.kill(slot.actor)
