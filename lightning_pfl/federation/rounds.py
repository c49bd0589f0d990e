"""`Rounds`: assign, let clients fit, guard, aggregate. The server's work between two Lightning epochs.

It knows clients by their ids and turns by their data; where they run is the pool's business, how long to wait for them
`gathering`'s, what is logged the server module's. A round that fails, is skipped or interrupted leaves the state of the
last whole round.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from lightning_pfl.aggregation import Aggregator
from lightning_pfl.aggregation.guard import Expectation, Inspection
from lightning_pfl.callbacks.federated import Exchange
from lightning_pfl.errors import ClientFailedError, FederationError
from lightning_pfl.federation.gathering import Gatherer, Harvest
from lightning_pfl.federation.history import LeftOut, RelevanceRecord, Traffic
from lightning_pfl.federation.jobs import Job, JobResult, LogRecord
from lightning_pfl.federation.metrics import mean_over_clients
from lightning_pfl.federation.plan import Plan
from lightning_pfl.federation.pools import ClientPool
from lightning_pfl.federation.rules import Decision, RoundRules, Shortfall
from lightning_pfl.federation.schedule import client_seed, participants, wanted
from lightning_pfl.federation.server_state import ServerState
from lightning_pfl.types import Assignment, ClientUpdate, FlatTensors, Personalized, SharedTensors

__all__ = ["Evaluation", "RoundReport", "Rounds"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RoundReport:
    """What came of one round of training.

    Attributes:
        metrics: means over the round's clients, by the user's names (validation: ``*_local``).
        logs: what each client handed to its logger.
        relevance: the round's matrices.
        counts: how many updates counted, and how many turns did not, by the names of metrics.
    """

    metrics: Mapping[str, float]
    logs: Mapping[str, Sequence[LogRecord]]
    relevance: RelevanceRecord
    counts: Mapping[str, float]


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
        aggregator: the server's rule, with its guard.
        exchange: the driver's, for its own module.
        fraction: of clients per round.
        rules: how long to wait for whom.
        seed: of the run.

    Attributes:
        participants: who delivered in the last round that was begun.
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
        rules: RoundRules,
        seed: int,
    ) -> None:
        self.plan = plan
        self.state = state
        self.waiting = False
        self.round: int | None = None
        self._aggregator = aggregator
        self._exchange = exchange
        self._fraction = fraction
        self._rules = rules
        self._seed = seed
        self._gatherer = Gatherer(pool, rules)
        self._clients = {client.id: client for client in plan.clients}
        self.participants: tuple[str, ...] = ()

    def train(self, round: int, module: L.LightningModule) -> RoundReport:
        """One round.

        Args:
            round: from 0.
            module: the driver's; receives the center of the adapters of its own architecture.

        Raises:
            ClientFailedError: a client raised, or the places where it ran died too often, and the round cannot do
                without it.
            FederationError: too few updates.
            RejectedUpdateError: the guard is strict, and an update does not count.
        """
        self.round = round
        drawn = participants(
            tuple(self._clients),
            fraction=self._fraction,
            seed=self._seed,
            round=round,
            over_select=self._rules.over_select,
        )
        enough = min(wanted(len(self._clients), self._fraction), len(drawn))
        asked = [client_id for client_id in drawn if client_id not in self._gatherer.pending]
        _LOG.info("Round %d: %d of %d clients train.", round, len(asked), len(self._clients))
        harvest = Harvest()
        try:
            inspection = self._gather(harvest, asked, round, enough)
            self.participants = tuple(client_id for client_id in self._clients if client_id in harvest.delivered)
            if inspection is None:
                return self._skipped(round, harvest)
            aggregation = self._aggregator.aggregate(inspection.accepted, self.state.aggregator)
            for update in inspection.accepted:
                if (state := harvest.states.get(update.client_id)) is not None:
                    self.state.store.put(update.client_id, state)
        finally:
            harvest.states.close()
        self._remember(round, harvest, inspection)
        for note in (*inspection.notes, *aggregation.notes):
            _LOG.info("Round %d: %s", round, note)
        record = self.state.accept(round, aggregation)
        self._update_driver(module, inspection.accepted)
        accepted = [harvest.delivered[update.client_id] for update in inspection.accepted]
        return RoundReport(
            metrics={**mean_over_clients([result.metrics for result in accepted]), **record.summary()},
            logs={client_id: harvest.delivered[client_id].logs for client_id in self.participants},
            relevance=record,
            counts=self._counts(round, len(accepted)),
        )

    def evaluate(self, client_ids: Sequence[str], stage: TrainerFn, round: int) -> Evaluation:
        """Run clients' personalised models, each on the client's own data.

        Raises:
            ClientFailedError, FederationError: a client raised or is late, and no quorum says that this is fine.
        """
        free = [client_id for client_id in client_ids if client_id not in self._gatherer.pending]
        harvest, needed = Harvest(), self._rules.needed(len(free))
        if free:
            self._collect(harvest, [self.job(client_id, stage, round) for client_id in free], len(free), needed)
        missing = harvest.missing()
        if len(harvest.delivered) < needed and free:
            raise self._too_few(Shortfall(round, 1, needed, len(harvest.delivered), missing), harvest)
        self._gatherer.give_up(harvest)
        for client_id, reason in missing.items():
            _LOG.warning("Round %d: client `%s` was not evaluated: it %s.", round, client_id, reason)
        results = [harvest.delivered[client_id] for client_id in free if client_id in harvest.delivered]
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

    def _gather(self, harvest: Harvest, asked: Sequence[str], round: int, enough: int) -> Inspection | None:
        """Ask clients until a round stands; None if it is skipped."""
        jobs = {client_id: self.job(client_id, TrainerFn.FITTING, round) for client_id in asked}
        needed, attempt, again = self._rules.needed(enough), 0, list(jobs.values())
        while True:
            attempt += 1
            self._collect(harvest, again, enough, needed)
            inspection = self._inspect(harvest)
            counted = len(harvest.delivered) if self._rules.quorum is None else len(inspection.accepted)
            if counted >= needed and inspection.accepted:
                self._gatherer.finish(harvest, round)
                return inspection
            rejected = {client_id: f"was left out: {why}" for client_id, why in inspection.rejected.items()}
            missing = {**harvest.missing(), **rejected}
            shortfall = Shortfall(round, attempt, needed, min(counted, len(inspection.accepted)), missing)
            decision = self._rules.below_quorum.decide(shortfall)
            if decision is Decision.STOP:
                raise self._too_few(shortfall, harvest)
            _LOG.warning("%s. `%s` says: %s.", shortfall, type(self._rules.below_quorum).__name__, decision.name)
            if decision is Decision.SKIP:
                for client_id, reason in missing.items():
                    self.state.left_out.append(LeftOut(round, client_id, reason))
                self._gatherer.give_up(harvest)
                self._gatherer.finish(harvest, round)
                return None
            again = self._gatherer.ask_again(harvest, jobs)

    def _collect(self, harvest: Harvest, jobs: Sequence[Job], enough: int, needed: int) -> None:
        self.waiting = True
        try:
            self._gatherer.collect(harvest, jobs, wanted=enough, needed=needed)
        finally:
            self.waiting = False

    def _inspect(self, harvest: Harvest) -> Inspection:
        """What the guard says of the updates that have come."""
        updates = [self._update(result) for result in harvest.delivered.values()]
        return self._aggregator.guard.inspect(
            updates,
            expected={update.client_id: self._expected(harvest.assignments[update.client_id]) for update in updates},
            measures=self.state.measures,
        )

    def _expected(self, assignment: Assignment) -> Expectation:
        client_id = assignment.client_id
        sample = self.plan.samples.get(self.plan.snapshot_of[client_id])
        layouts = None if sample is None else (sample.shared.common.layout, sample.shared.same_architecture.layout)
        architecture = None if sample is None else sample.architecture
        if sample is None and client_id in self.state.layouts:
            architecture, *known = self.state.layouts[client_id]
            layouts = known[0], known[1]
        return Expectation(
            round=assignment.round,
            architecture=architecture,
            layouts=layouts,
            start=_start(None if sample is None else sample.shared, assignment.personalized.start),
            sketch_size=self.state.sketch_size,
            counted=self._clients[client_id].num_examples is not None,
        )

    def _remember(self, round: int, harvest: Harvest, inspection: Inspection) -> None:
        """What is known after a round that counts."""
        self.state.measures = inspection.measures
        for update in inspection.accepted:
            if self.plan.snapshot_of[update.client_id] not in self.plan.samples:
                shared = update.shared
                known = update.architecture, shared.common.layout, shared.same_architecture.layout
                self.state.layouts.setdefault(update.client_id, known)
            if update.sketch is not None:
                self.state.sketch_size = update.sketch.numel()
        for result in harvest.delivered.values():
            assert result.update is not None
            self.state.traffic[result.client_id] += Traffic(up=result.update.nbytes)
        reasons = {client_id: f"failed:\n{failure.trace}" for client_id, failure in harvest.failed.items()}
        for client_id, reason in {**reasons, **inspection.rejected}.items():
            times = 1 + sum(one.client_id == client_id for one in self.state.left_out)
            said = reason if client_id in inspection.rejected else harvest.missing()[client_id]
            self.state.left_out.append(LeftOut(round, client_id, said))
            _LOG.warning(
                "Round %d: client `%s` was left out, for the %d. time; it goes on from where it was before. Reason: %s",
                *(round, client_id, times, reason),
            )

    def _skipped(self, round: int, harvest: Harvest) -> RoundReport:
        record = RelevanceRecord(round, (), None, None)
        self.state.relevance.append(record)
        logs = {client_id: harvest.delivered[client_id].logs for client_id in self.participants}
        return RoundReport(metrics={}, logs=logs, relevance=record, counts=self._counts(round, 0))

    def _counts(self, round: int, updates: int) -> dict[str, float]:
        left_out = sum(one.round == round for one in self.state.left_out)
        return {"round/updates": float(updates), "round/left_out": float(left_out)}

    def _too_few(self, shortfall: Shortfall, harvest: Harvest) -> FederationError:
        for client_id, failure in harvest.failed.items():
            return ClientFailedError(client_id, shortfall.round, failure.trace)
        return FederationError(
            f"{shortfall}. Give clients more time (`RoundRules(deadline=...)`), let the round do with fewer "
            "(`quorum=...`), or say what else is to be done (`below_quorum=RetryRound(...)` or `SkipRound()`)."
        )

    def _update(self, result: JobResult) -> ClientUpdate:
        assert result.update is not None
        given = self._clients[result.client_id].num_examples
        return result.update if given is None else replace(result.update, num_examples=given)

    def _update_driver(self, module: L.LightningModule, updates: Sequence[ClientUpdate]) -> None:
        mine = self._exchange.architecture(module)
        if alike := [update for update in updates if update.architecture == mine]:
            self._exchange.receive(module, Personalized(start=self._aggregator.center(alike)))


def _start(built: SharedTensors | None, sent: SharedTensors | None) -> SharedTensors | None:
    """From where a client sets out: as its model is built, with what the server sends over it."""
    if built is None or sent is None:
        return sent if built is None else built
    return SharedTensors(
        FlatTensors.pack({**built.common.unpack(), **sent.common.unpack()}),
        FlatTensors.pack({**built.same_architecture.unpack(), **sent.same_architecture.unpack()}),
    )
