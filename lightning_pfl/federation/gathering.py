"""Waiting for clients: as many as are wanted, as long as is allowed, and no longer than it can help.

Start at `Gatherer.collect`. It asks clients, takes results as they come, and stops at the first of: enough have
delivered, the deadline, too many have failed for the quorum to be reached. What follows from too few is decided
elsewhere; this file knows turns and time, but neither updates nor aggregation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

from lightning.pytorch.trainer.states import TrainerFn

from lightning_pfl.federation.jobs import Failure, Job, JobResult
from lightning_pfl.federation.pools import ClientPool
from lightning_pfl.federation.rules import RoundRules
from lightning_pfl.federation.store import ClientStore
from lightning_pfl.types import Assignment

__all__ = ["Gatherer", "Harvest"]

_LOG = logging.getLogger(__name__)
_LATE = "is late"


@final
@dataclass(eq=False)
class Harvest:
    """What has come of one round's turns so far, of one kind: training, or evaluating.

    Attributes:
        stage: of all of them.
        store: where delivered clients' new private states are staged, until it is clear whether the round counts.
        delivered: results without their states, by client id; also of clients that were asked in an earlier round.
        assignments: what each delivered client was asked.
        failed: why clients gave no result.
        open: jobs at work.
        unreadable: why the letters of clients among the delivered cannot be read.
    """

    stage: TrainerFn
    store: ClientStore
    delivered: dict[str, JobResult] = field(default_factory=dict)
    assignments: dict[str, Assignment] = field(default_factory=dict)
    failed: dict[str, Failure] = field(default_factory=dict)
    open: dict[str, Job] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    def missing(self) -> dict[str, str]:
        """Why clients have not delivered, in words."""
        failed = {name: f"failed ({_last_line(failure.trace)})" for name, failure in sorted(self.failed.items())}
        return failed | dict.fromkeys(sorted(self.open), _LATE)

    def take(self, result: JobResult, assignment: Assignment) -> None:
        """Note what has come of a client's turn."""
        if result.failure is not None:
            self.failed[result.client_id] = result.failure
            return
        if result.state is not None:
            self.store.stage(result.client_id, result.state)
        self.delivered[result.client_id] = replace(result, state=None)
        self.assignments[result.client_id] = assignment


@final
class Gatherer:
    """Collects results round after round.

    Args:
        pool: started.
        rules: of the run.
        tell: is told how many clients have delivered, and how many are wanted.
        read: reads the letter that a result holds; raises `ValueError` where that is none.
        seconds: that turns took before, by client.

    Attributes:
        pending: clients that still train for an earlier round, with what they were asked.
        seconds: how long each client's last training turn took.
    """

    def __init__(
        self,
        pool: ClientPool,
        rules: RoundRules,
        tell: Callable[[int, int], None],
        read: Callable[[JobResult, Assignment], JobResult],
        seconds: Mapping[str, float],
    ) -> None:
        self.pending: dict[str, Assignment] = {}
        self.seconds = dict(seconds)
        self._arrived: list[JobResult] = []  # of pending clients, while others were evaluated
        self._pool = pool
        self._rules = rules
        self._tell = tell
        self._read = read

    def collect(self, harvest: Harvest, jobs: Sequence[Job], *, wanted: int, needed: int) -> None:
        """Ask clients, and wait.

        Args:
            harvest: of the round; changed in place.
            jobs: whom to ask now, beside those that are at work already.
            wanted: how many results are enough.
            needed: with fewer it is no use to wait.
        """
        end = None
        if self._rules.deadline is not None:
            self._pool.wait_until_ready()
            end = self._pool.now() + self._rules.deadline
        for job in jobs:
            harvest.failed.pop(job.assignment.client_id, None)
            harvest.open[job.assignment.client_id] = job
        self._pool.submit(jobs)
        self._tell(len(harvest.delivered), wanted)
        while self._waits_on(harvest, wanted=wanted, needed=needed):
            if harvest.stage is TrainerFn.FITTING and self._arrived:
                result: JobResult | None = self._arrived.pop(0)
            else:
                result = self._pool.next(None if end is None else end - self._pool.now())
            if result is None:
                break
            if result.client_id in harvest.open:
                self._take(harvest, result, harvest.open.pop(result.client_id).assignment)
            elif harvest.stage is TrainerFn.FITTING:
                self._take(harvest, result, self.pending.pop(result.client_id))
            else:
                self._arrived.append(result)
                continue
            _LOG.info("%d of %d clients done (%s).", len(harvest.delivered), wanted, result.client_id)
            self._tell(len(harvest.delivered), wanted)

    def ask_again(self, harvest: Harvest, jobs: Sequence[Job]) -> list[Job]:
        """The jobs of clients that are missing; those that are late, and would not be waited for, are cancelled."""
        if not self._rules.late.waits(0):
            self.give_up(harvest)
        return [
            job
            for job in jobs
            if job.assignment.client_id not in harvest.delivered and job.assignment.client_id not in harvest.open
        ]

    def finish(self, harvest: Harvest, round: int) -> dict[str, str]:
        """End a round of training: leave late clients at work, or cancel them, as the rules say.

        Returns:
            Why clients were cancelled, by client id.
        """
        self.pending |= {client_id: job.assignment for client_id, job in harvest.open.items()}
        harvest.open.clear()
        dropped = {
            client_id: f"{_LATE}: it was asked in round {assignment.round}"
            for client_id, assignment in sorted(self.pending.items())
            if not self._rules.late.waits(round - assignment.round)
        }
        self._cancel(dropped)
        if self.pending:
            _LOG.info("Round %d: %s are late and stay at work.", round, sorted(self.pending))
        return dropped

    def give_up(self, harvest: Harvest) -> None:
        """Cancel whoever is at work for this round; nothing of it will count."""
        self._cancel(harvest.open)
        harvest.open.clear()

    def _take(self, harvest: Harvest, result: JobResult, assignment: Assignment) -> None:
        if harvest.stage is TrainerFn.FITTING and result.failure is None:
            self.seconds[result.client_id] = result.seconds
        try:
            result = self._read(result, assignment)
        except ValueError as error:
            harvest.unreadable[result.client_id] = f"what it sent cannot be read: {error}"
        harvest.take(result, assignment)

    def _waits_on(self, harvest: Harvest, *, wanted: int, needed: int) -> bool:
        got, pending = len(harvest.delivered), len(self.pending) if harvest.stage is TrainerFn.FITTING else 0
        if got >= wanted or got + len(harvest.open) + pending < needed:
            return False
        return bool(harvest.open) or (got < needed and pending > 0)

    def _cancel(self, clients: Mapping[str, object]) -> None:
        if not clients:
            return
        _LOG.warning("Cancelled clients that have not delivered in time: %s.", sorted(clients))
        for client_id in clients:
            self.pending.pop(client_id, None)
        self._arrived = [result for result in self._arrived if result.client_id not in clients]
        self._pool.cancel(list(clients))


def _last_line(trace: str) -> str:
    return trace.strip().splitlines()[-1] if trace.strip() else "no traceback"
