"""`Rounds`: assign, let clients fit, aggregate. The server's work between two Lightning epochs.

It knows clients by their ids and turns by their data; where they run is the pool's business, what is logged the
server module's. A round that fails or is interrupted leaves the state of the last whole round.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from lightning_pfl.aggregation import Aggregator
from lightning_pfl.callbacks.federated import Exchange
from lightning_pfl.errors import ClientFailedError
from lightning_pfl.federation.history import RelevanceRecord, Traffic
from lightning_pfl.federation.jobs import Job, JobResult, LogRecord
from lightning_pfl.federation.metrics import mean_over_clients
from lightning_pfl.federation.plan import Plan
from lightning_pfl.federation.pools import ClientPool
from lightning_pfl.federation.schedule import client_seed, participants
from lightning_pfl.federation.server_state import ServerState
from lightning_pfl.federation.store import ClientStore
from lightning_pfl.functional.averaging import weighted_mean
from lightning_pfl.types import Assignment, ClientUpdate, Personalized, SharedTensors

__all__ = ["Evaluation", "RoundReport", "Rounds"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RoundReport:
    """What came of one round of training.

    Attributes:
        metrics: means over the round's clients, by the user's names (validation: ``*_local``).
        logs: what each client handed to its logger.
        relevance: the round's matrices.
    """

    metrics: Mapping[str, float]
    logs: Mapping[str, Sequence[LogRecord]]
    relevance: RelevanceRecord


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What came of evaluating clients' personalised models.

    Attributes:
        metrics: by client id, by the user's names.
        predictions: by client id.
    """

    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    predictions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def means(self) -> dict[str, float]:
        """Each metric's mean over the clients that have it."""
        return mean_over_clients(list(self.metrics.values()))


@final
class Rounds:
    """Runs rounds.

    Args:
        plan: of the run.
        state: of the server; changed in place, once per round.
        pool: started.
        aggregator: the server's rule.
        exchange: the driver's, for its own module.
        fraction: of clients per round.
        seed: of the run.

    Attributes:
        participants: of the last round that was begun.
        round: which one that was.
        waiting: whether clients are at work.
    """

    def __init__(
        self,
        plan: Plan,
        state: ServerState,
        *,
        pool: ClientPool,
        aggregator: Aggregator,
        exchange: Exchange,
        fraction: float,
        seed: int,
    ) -> None:
        self.plan = plan
        self.state = state
        self.waiting = False
        self.round: int | None = None
        self._pool = pool
        self._aggregator = aggregator
        self._exchange = exchange
        self._fraction = fraction
        self._seed = seed
        self._clients = {client.id: client for client in plan.clients}
        self.participants: tuple[str, ...] = ()

    def train(self, round: int, module: L.LightningModule) -> RoundReport:
        """One round.

        Args:
            round: from 0.
            module: the driver's; receives the mean of the adapters of its own architecture.

        Raises:
            ClientFailedError: a client raised, or the places where it ran died too often.
        """
        self.round = round
        self.participants = participants(tuple(self._clients), fraction=self._fraction, seed=self._seed, round=round)
        _LOG.info("Round %d: %d of %d clients train.", round, len(self.participants), len(self._clients))
        unconfirmed = ClientStore()  # a client's new state counts when the whole round does
        try:
            results = self._run(self.participants, TrainerFn.FITTING, round, keep=unconfirmed)
            updates = [self._update(result) for result in results]
            aggregation = self._aggregator.aggregate(updates, self.state.aggregator)
            for client_id in unconfirmed.ids():
                self.state.store.put(client_id, unconfirmed.get(client_id) or b"")
        finally:
            unconfirmed.close()
        for note in aggregation.notes:
            _LOG.info("Round %d: %s", round, note)
        for update in updates:
            self.state.traffic[update.client_id] += Traffic(up=update.nbytes)
        record = self.state.accept(round, aggregation)
        self._update_driver(module, updates)
        return RoundReport(
            metrics={**mean_over_clients([result.metrics for result in results]), **record.summary()},
            logs={result.client_id: result.logs for result in results},
            relevance=record,
        )

    def evaluate(self, client_ids: Sequence[str], stage: TrainerFn, round: int) -> Evaluation:
        """Run clients' personalised models, each on the client's own data.

        Raises:
            ClientFailedError: as `train`.
        """
        results = self._run(client_ids, stage, round)
        if stage is TrainerFn.PREDICTING:
            return Evaluation(predictions={result.client_id: result.predictions for result in results})
        return Evaluation(metrics={result.client_id: result.metrics for result in results})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold; loads with ``weights_only=True``."""
        return self.state.state_dict(self._aggregator, self.plan.fingerprints)

    def load_state_dict(self, saved: Mapping[str, Any], *, training: bool) -> None:
        """Go back to a checkpoint.

        Raises:
            CheckpointMismatchError: it belongs to another run.
        """
        self.state.load_state_dict(saved, self._aggregator if training else None, self.plan.fingerprints)

    def job(self, client_id: str, stage: TrainerFn, round: int, *, count: bool = True) -> Job:
        """A client's next turn as data; ``count`` says whether what the server sends is traffic."""
        return Job(
            assignment=Assignment(client_id, round, self.state.next_for(client_id, count=count)),
            stage=stage,
            snapshot=self.plan.snapshot_of[client_id],
            state=self.state.store.get(client_id),
            seed=client_seed(self._seed, client_id),
            num_threads=self._clients[client_id].num_threads,
        )

    def _run(
        self, client_ids: Sequence[str], stage: TrainerFn, round: int, keep: ClientStore | None = None
    ) -> list[JobResult]:
        """Results in the order of the ids, whatever the order in which they come."""
        jobs = [self.job(client_id, stage, round) for client_id in client_ids]
        done: dict[str, JobResult] = {}
        self.waiting = True
        try:
            for result in self._pool.run(jobs):
                if result.failure is not None:
                    raise ClientFailedError(result.client_id, round, result.failure.trace)
                if keep is not None and result.state is not None:
                    keep.put(result.client_id, result.state)
                done[result.client_id] = replace(result, state=None)
                _LOG.info("Round %d: %d of %d clients done (%s).", round, len(done), len(jobs), result.client_id)
        finally:
            self.waiting = False
        return [done[client_id] for client_id in client_ids]

    def _update(self, result: JobResult) -> ClientUpdate:
        assert result.update is not None
        given = self._clients[result.client_id].num_examples
        return result.update if given is None else replace(result.update, num_examples=given)

    def _update_driver(self, module: L.LightningModule, updates: Sequence[ClientUpdate]) -> None:
        mine = self._exchange.architecture(module)
        alike = [update for update in updates if update.architecture == mine]
        if not alike:
            return
        counts = [update.num_examples for update in alike]
        mean = SharedTensors(
            common=weighted_mean([update.shared.common for update in alike], counts),
            same_architecture=weighted_mean([update.shared.same_architecture for update in alike], counts),
        )
        self._exchange.receive(module, Personalized(start=mean))
