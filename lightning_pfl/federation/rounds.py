"""`Rounds`: assign, let clients fit, guard, aggregate. The server's work between two Lightning epochs.

It knows clients by their ids and turns by their data; where they run is the pool's business, how long to wait for them
`gathering`'s, what is logged the server module's. A round that fails, is skipped or interrupted leaves the state of the
last whole round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from lightning_pfl.aggregation import Aggregator, Welcome, WelcomingAggregator
from lightning_pfl.aggregation.guard import Inspection
from lightning_pfl.callbacks.federated import Exchange
from lightning_pfl.errors import ClientFailedError, FederationError, RejectedUpdateError
from lightning_pfl.federation.expected import expectation, learn
from lightning_pfl.federation.gathering import Gatherer, Harvest
from lightning_pfl.federation.history import LeftOut, RelevanceRecord, Traffic
from lightning_pfl.federation.jobs import Job, JobResult, LogRecord
from lightning_pfl.federation.metrics import mean_over_clients
from lightning_pfl.federation.plan import Plan
from lightning_pfl.federation.pools import ClientPool
from lightning_pfl.federation.rules import Decision, RoundRules, Shortfall
from lightning_pfl.federation.schedule import client_seed, participants, wanted
from lightning_pfl.federation.server_state import ServerState
from lightning_pfl.types import Assignment, ClientUpdate, Personalized

__all__ = ["Evaluation", "RoundReport", "Rounds"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RoundReport:
    """What came of one round of training.

    Attributes:
        metrics: means over the round's clients, by the user's names (validation: ``*_local``).
        logs: what each client handed to its logger.
        relevance: the round's matrices.
        counts: how many updates counted, how many turns did not, and bytes so far, by the names of metrics.
        spent: epsilon so far, of each client and the highest; nothing where nothing is noised.
    """

    metrics: Mapping[str, float]
    logs: Mapping[str, Sequence[LogRecord]]
    relevance: RelevanceRecord
    counts: Mapping[str, float]
    spent: Mapping[str, float]


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
        tell: is told how many clients have delivered, and how many are wanted.
        seconds: how long turns took in an earlier launch, by client id.

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
        tell: Callable[[int, int], None],
        seconds: Mapping[str, float],
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
        self._gatherer = Gatherer(pool, rules, tell, self._read, seconds)
        self._clients = {client.id: client for client in plan.clients}
        self.participants: tuple[str, ...] = ()

    @property
    def seconds(self) -> Mapping[str, float]:
        """How long each client's last training turn took, by id."""
        return self._gatherer.seconds

    def train(self, round: int, module: L.LightningModule) -> RoundReport:
        """One round.

        Args:
            round: from 0.
            module: the driver's; receives the center of the adapters of its own architecture.

        Raises:
            ClientFailedError: a client raised, or the places where it ran died too often, and the round cannot do
                without it.
            FederationError: too few updates.
            PrivacyBudgetError: a client has no budget left for what the round asks of it; nobody has trained then.
            RejectedUpdateError: the guard is strict, and an update does not count.
        """
        self.round = round
        busy, rules = self._gatherer.pending, self._rules
        asked = participants(
            tuple(self._clients),
            fraction=self._fraction,
            seed=self._seed,
            round=round,
            over_select=rules.over_select,
            busy=busy,
        )
        self.state.ledgers.require_room(asked, round)
        self.state.settle()  # before anything has changed, as the disk may be full
        enough = min(wanted(len(self._clients), self._fraction), len(asked) + len(busy))
        _LOG.info("Round %d: %d of %d clients train.", round, len(asked) + len(busy), len(self._clients))
        harvest = Harvest(TrainerFn.FITTING, self.state.store)
        try:
            jobs = [self.job(client_id, TrainerFn.FITTING, round) for client_id in asked]
            inspection = self._gather(harvest, jobs, round, enough)
            self.participants = tuple(client_id for client_id in self._clients if client_id in harvest.delivered)
            if inspection is None:
                nothing = RelevanceRecord(round, (), None, None)
                self.state.relevance.append(nothing)
                return self._report(harvest, nothing, counted=())
            accepted = [
                replace(update, staleness=round - harvest.assignments[update.client_id].round)
                for update in inspection.accepted
            ]
            aggregation = self._aggregator.aggregate(accepted, self.state.aggregator)
            names = [update.client_id for update in accepted]
            keeping = set(self.state.store.staged())
            self.state.store.accept(names)
            for update in accepted:
                if update.client_id in keeping:
                    self.state.post.count(update.client_id, update.shared)
        finally:
            self.state.store.drop()
        self.state.measures = inspection.measures
        for update in accepted:
            learn(update, plan=self.plan, state=self.state)
        for note in (*inspection.notes, *aggregation.notes):
            _LOG.info("Round %d: %s", round, note)
        record = self.state.accept(round, aggregation)
        self._update_driver(module, accepted)
        return self._report(harvest, record, counted=[update.client_id for update in accepted])

    def evaluate(self, client_ids: Sequence[str], stage: TrainerFn, round: int) -> Evaluation:
        """Run clients' personalised models, each on the client's own data.

        Raises:
            ClientFailedError, FederationError: a client raised or is late, and the rules do not say that this is fine.
        """
        asked = [client_id for client_id in client_ids if client_id not in self._gatherer.pending]
        if len(asked) < len(client_ids):
            _LOG.info("Round %d: clients that are at work are not evaluated.", round)
        if not asked:
            return Evaluation()
        harvest = Harvest(stage, self.state.store)
        jobs = [self.job(client_id, stage, round) for client_id in asked]

        def come() -> tuple[int, dict[str, str]]:
            return len(harvest.delivered), harvest.missing()

        self._collect(harvest, jobs, round, len(asked), come)
        for client_id, reason in harvest.missing().items():
            _LOG.warning("Round %d: client `%s` was not evaluated: it %s.", round, client_id, reason)
        self._gatherer.give_up(harvest)
        results = [harvest.delivered[client_id] for client_id in asked if client_id in harvest.delivered]
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
            assignment=Assignment(client_id, round, self.state.next_for(client_id, round=round if count else None)),
            stage=stage,
            snapshot=self.plan.snapshot_of[client_id],
            state=self.state.store.get(client_id),
            seed=client_seed(self._seed, client_id),
            num_threads=self._clients[client_id].num_threads,
            permit=self.state.ledgers.permit(client_id, self.state.store) if stage is TrainerFn.FITTING else None,
            terms=self.state.post.terms(client_id),
        )

    def welcome(self, newcomer: ClientUpdate) -> Welcome:
        """What a client receives that took no part: a mixture of its own, or what every unknown client receives.

        Raises:
            ValueError: nobody has sent anything yet, or the newcomer does not fit the others.
        """
        if isinstance(self._aggregator, WelcomingAggregator):
            return self._aggregator.welcome(newcomer, self.state.aggregator)
        name = type(self._aggregator).__name__
        sent = self.state.post.opened("", self.state.newcomer)
        return Welcome(sent, {}, [f"`{name}` sends the same to every newcomer, whatever its task."])

    def _gather(self, harvest: Harvest, jobs: Sequence[Job], round: int, enough: int) -> Inspection | None:
        """Train clients until a round stands; None if it is skipped."""
        inspection: Inspection | None = None

        def count() -> tuple[int, dict[str, str]]:
            nonlocal inspection
            inspection = self._inspect(harvest)
            got = len(inspection.accepted)
            if got and self._rules.quorum is None:
                got = len(harvest.delivered)
            rejected = {client_id: f"was left out: {why}" for client_id, why in inspection.rejected.items()}
            return got, {**harvest.missing(), **rejected}

        stands = self._collect(harvest, jobs, round, enough, count)
        assert inspection is not None
        reasons = {**harvest.missing(), **inspection.rejected}
        late = set(harvest.open)
        if not stands:
            self._gatherer.give_up(harvest)
        dropped = self._gatherer.finish(harvest, round)
        left_out = {client_id: why for client_id, why in reasons.items() if client_id not in late or not stands}
        for client_id, reason in {**left_out, **dropped}.items():
            self._leave_out(round, client_id, reason)
        for result in harvest.delivered.values():
            self.state.count(round, result.client_id, Traffic(up=result.nbytes))
        return inspection if stands else None

    def _collect(
        self,
        harvest: Harvest,
        jobs: Sequence[Job],
        round: int,
        enough: int,
        count: Callable[[], tuple[int, dict[str, str]]],
    ) -> bool:
        """Ask clients until there are enough, or the rules say what to do without.

        Args:
            harvest: changed in place.
            jobs: whom to ask.
            round: which one.
            enough: how many results to wait for.
            count: says how many of them count, and why the others do not.

        Returns:
            Whether there are enough.
        """
        needed, attempt, again = self._rules.needed(enough), 0, list(jobs)
        while True:
            attempt += 1
            self.waiting = True
            try:
                self._gatherer.collect(harvest, again, wanted=enough, needed=needed)
            finally:
                self.waiting = False
                for result in harvest.delivered.values():
                    if result.update is not None:
                        self.state.ledgers.charge(result.update)  # it has been seen, whatever becomes of the round
            got, missing = count()
            if got >= needed:
                break
            shortfall = Shortfall(round, attempt, needed, got, missing)
            decision = self._rules.below_quorum.decide(shortfall)
            if decision is Decision.STOP:
                raise self._too_few(shortfall, harvest)
            _LOG.warning("%s. `%s` says: %s.", shortfall, type(self._rules.below_quorum).__name__, decision.name)
            if decision is Decision.SKIP:
                break
            again = self._gatherer.ask_again(harvest, jobs)
        for client_id, failure in sorted(harvest.failed.items()):
            _LOG.warning("Round %d: the traceback of client `%s`:\n%s", round, client_id, failure.trace)
        return got >= needed

    def _inspect(self, harvest: Harvest) -> Inspection:
        """What the guard says of the updates that have come."""
        readable = [one for one in harvest.delivered.values() if one.client_id not in harvest.unreadable]
        delivered = [self._update(result) for result in readable]
        updates = [update for update in delivered if update.num_examples]
        expected = {
            client_id: expectation(self._clients[client_id], assignment, plan=self.plan, state=self.state)
            for client_id, assignment in harvest.assignments.items()
        }
        guard = self._aggregator.guard
        inspection = guard.inspect(updates, expected=expected, measures=self.state.measures)
        if harvest.unreadable and guard.strict:
            raise RejectedUpdateError(f"These updates cannot be mixed: {dict(sorted(harvest.unreadable.items()))}.")
        idle = {update.client_id: "it had nothing to train on" for update in delivered if not update.num_examples}
        return replace(inspection, rejected={**inspection.rejected, **harvest.unreadable, **idle})

    def _read(self, result: JobResult, assignment: Assignment) -> JobResult:
        """A result with its letter read."""
        if result.update is None or self.state.post.wire is None:
            return result
        return replace(result, update=self.state.post.read(result.letter, result.update, assignment))

    def _leave_out(self, round: int, client_id: str, reason: str) -> None:
        times = 1 + sum(one.client_id == client_id for one in self.state.left_out)
        self.state.left_out.append(LeftOut(round, client_id, reason))
        _LOG.warning(
            "Round %d: client `%s` was left out, for the %d. time; it goes on from where it was before. Reason: %s",
            *(round, client_id, times, reason),
        )

    def _report(self, harvest: Harvest, record: RelevanceRecord, counted: Sequence[str]) -> RoundReport:
        left_out = sum(one.round == record.round for one in self.state.left_out)
        metrics = mean_over_clients([harvest.delivered[client_id].metrics for client_id in counted])
        return RoundReport(
            metrics={**metrics, **record.summary()},
            logs={client_id: harvest.delivered[client_id].logs for client_id in self.participants},
            relevance=record,
            counts={
                "round/updates": float(len(counted)),
                "round/left_out": float(left_out),
                **dict(zip(("traffic/up", "traffic/down"), map(float, self.state.bytes_so_far), strict=True)),
            },
            spent=self.state.ledgers.metrics(),
        )

    def _too_few(self, shortfall: Shortfall, harvest: Harvest) -> FederationError:
        for client_id, failure in sorted(harvest.failed.items()):
            return ClientFailedError(client_id, shortfall.round, failure.trace)
        return FederationError(
            f"{shortfall}. Give clients more time (`RoundRules(deadline=...)`), let the round do with fewer "
            "(`quorum=...`), or say what else is to be done (`below_quorum=RetryRound(...)` or `SkipRound()`)."
        )

    def _update(self, result: JobResult) -> ClientUpdate:
        assert result.update is not None
        given = self._clients[result.client_id].num_examples
        idle = result.update.num_examples == 0
        return result.update if given is None or idle else replace(result.update, num_examples=given)

    def _update_driver(self, module: L.LightningModule, updates: Sequence[ClientUpdate]) -> None:
        mine = self._exchange.architecture(module)
        if alike := [update for update in updates if update.architecture == mine]:
            self._exchange.receive(module, Personalized(start=self._aggregator.center(alike)))
