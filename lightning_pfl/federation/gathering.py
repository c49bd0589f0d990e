"""Waiting for clients: as many as are wanted, as long as is allowed, and no longer than it can help.

Start at `Gatherer.collect`. It asks clients, takes results as they come, and stops at the first of: enough have
delivered, the deadline, too many have failed for the quorum to be reached. What follows from too few is decided
elsewhere; this file knows turns and time, but neither updates nor aggregation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

from lightning_pfl.federation.jobs import Failure, Job, JobResult
from lightning_pfl.federation.pools import ClientPool
from lightning_pfl.federation.rules import RoundRules
from lightning_pfl.federation.store import ClientStore
from lightning_pfl.types import Assignment

__all__ = ["Gatherer", "Harvest"]

_LOG = logging.getLogger(__name__)


@final
@dataclass(eq=False)
class Harvest:
    """What has come of one round's turns so far.

    Attributes:
        states: delivered clients' new private states, until it is clear whether the round counts.
        delivered: results without their states, by client id; also of clients that were asked in an earlier round.
        assignments: what each delivered client was asked.
        failed: why clients gave no result.
        open: jobs at work.
    """

    states: ClientStore = field(default_factory=ClientStore)
    delivered: dict[str, JobResult] = field(default_factory=dict)
    assignments: dict[str, Assignment] = field(default_factory=dict)
    failed: dict[str, Failure] = field(default_factory=dict)
    open: dict[str, Job] = field(default_factory=dict)

    def missing(self) -> dict[str, str]:
        """Why clients have not delivered, in words."""
        reasons = {client_id: f"failed ({_last_line(failure.trace)})" for client_id, failure in self.failed.items()}
        return reasons | dict.fromkeys(self.open, "is late")


@final
class Gatherer:
    """Collects results round after round.

    Args:
        pool: started.
        rules: of the run.

    Attributes:
        pending: clients that are still at work for an earlier round, with what they were asked.
    """

    def __init__(self, pool: ClientPool, rules: RoundRules) -> None:
        self.pending: dict[str, Assignment] = {}
        self._pool = pool
        self._rules = rules

    def collect(self, harvest: Harvest, jobs: Sequence[Job], *, wanted: int, needed: int) -> None:
        """Ask clients, and wait.

        Args:
            harvest: of the round; changed in place.
            jobs: whom to ask now, beside those that are at work already.
            wanted: how many results are enough.
            needed: with fewer it is no use to wait.
        """
        if self._rules.deadline is not None:
            self._pool.wait_until_ready()
        end = None if self._rules.deadline is None else self._pool.now() + self._rules.deadline
        for job in jobs:
            harvest.failed.pop(job.assignment.client_id, None)
            harvest.open[job.assignment.client_id] = job
        self._pool.submit(jobs)
        total = len(harvest.delivered) + len(harvest.open)
        while self._waits_on(harvest, wanted=wanted, needed=needed):
            result = self._pool.next(None if end is None else end - self._pool.now())
            if result is None:
                break
            self._take(harvest, result)
            _LOG.info("%d of %d clients done (%s).", len(harvest.delivered), total, result.client_id)

    def ask_again(self, harvest: Harvest, jobs: Mapping[str, Job]) -> list[Job]:
        """The jobs of clients that are missing; those that are late, and would not be waited for, are cancelled."""
        if harvest.open and not self._rules.late.waits(0):
            self._cancel(harvest)
        return [job for client, job in jobs.items() if client not in harvest.delivered and client not in harvest.open]

    def finish(self, harvest: Harvest, round: int) -> None:
        """End a round: leave late clients at work, or cancel them, as the rules say."""
        self.pending |= {client_id: job.assignment for client_id, job in harvest.open.items()}
        harvest.open.clear()
        too_late = [
            client_id
            for client_id, assignment in self.pending.items()
            if not self._rules.late.waits(round - assignment.round)
        ]
        for client_id in too_late:
            asked = self.pending.pop(client_id).round
            _LOG.warning(
                "Round %d: client `%s`, asked in round %d, is late and was cancelled.", round, client_id, asked
            )
        if too_late:
            self._pool.cancel(too_late)
        if self.pending:
            _LOG.info("Round %d: %s are late and stay at work.", round, sorted(self.pending))

    def give_up(self, harvest: Harvest) -> None:
        """Cancel whoever is at work for this round; nothing of it will count."""
        self._cancel(harvest)

    def _waits_on(self, harvest: Harvest, *, wanted: int, needed: int) -> bool:
        got = len(harvest.delivered)
        if got >= wanted or got + len(harvest.open) + len(self.pending) < needed:
            return False
        return bool(harvest.open) or (got < needed and bool(self.pending))

    def _take(self, harvest: Harvest, result: JobResult) -> None:
        client_id = result.client_id
        job = harvest.open.pop(client_id, None)
        assignment = self.pending.pop(client_id) if job is None else job.assignment
        if result.failure is not None:
            harvest.failed[client_id] = result.failure
            return
        if result.state is not None:
            harvest.states.put(client_id, result.state)
        harvest.delivered[client_id] = replace(result, state=None)
        harvest.assignments[client_id] = assignment

    def _cancel(self, harvest: Harvest) -> None:
        if harvest.open:
            _LOG.warning("Cancelled clients that have not delivered: %s.", sorted(harvest.open))
            self._pool.cancel(list(harvest.open))
            harvest.open.clear()


def _last_line(trace: str) -> str:
    return trace.strip().splitlines()[-1] if trace.strip() else "no traceback"
