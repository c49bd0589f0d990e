"""`FederatedStrategy`: what a user hands to ``Trainer(strategy=...)``.

It holds the federation's settings and what it knows from launch to launch. What happens in a launch stands in
`launcher`, what happens in a round in `rounds`, and what happens in a client's turn in `turn`.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_pfl.aggregation import Aggregator, FedAvg, RelevanceAggregator, UniformAggregator
from lightning_pfl.callbacks.federated import Exchange, SketchSource
from lightning_pfl.errors import FederationError
from lightning_pfl.federation._compat import MockOptimizer
from lightning_pfl.federation.checkpoint_files import CheckpointFiles
from lightning_pfl.federation.client import Client, as_clients
from lightning_pfl.federation.experts import Experts
from lightning_pfl.federation.history import LeftOut, RelevanceRecord, RoundTraffic, Traffic
from lightning_pfl.federation.launcher import FederatedLauncher
from lightning_pfl.federation.personal import Newcomer, experts, export, personalize, personalize_new
from lightning_pfl.federation.pools import ClientPool, RayPool
from lightning_pfl.federation.privacy import Privacy
from lightning_pfl.federation.rounds import Rounds
from lightning_pfl.federation.rules import RoundRules
from lightning_pfl.federation.server_state import ServerState
from lightning_pfl.federation.store import ClientStore
from lightning_pfl.federation.template import ClientTemplate
from lightning_pfl.functional.routing import Answering, Blend
from lightning_pfl.functional.wire import LargestChanges, WireFormat

__all__ = ["FederatedStrategy"]

_LOG = logging.getLogger(__name__)


class FederatedStrategy(SingleDeviceStrategy):
    """Trains one model per client, and lets clients learn from each other. One epoch of the Trainer is one round.

    Each round, clients fit for `local_epochs` from where they were, the server mixes what they share, and every client
    receives a mixture of its own. All that a Trainer does besides (checkpoints, early stopping, ``ckpt_path=``,
    loggers) goes on around rounds. If a client raises, the run ends with its traceback, and a checkpoint has the last
    whole round: going on without a client would change what the others learn.

    Args:
        clients: who takes part; a number makes that many, called ``client-0`` and so on.
        aggregator: the server's rule. None: `RelevanceAggregator` if a `RelevanceProbe` is among the callbacks; else
            `UniformAggregator`, or `FedAvg` if nothing but `share` is shared. The log says which.
        pool: where clients run. None: `RayPool()`.
        local_epochs: epochs of a client per round.
        local_steps: optimizer steps of a client per round instead; a turn may end inside an epoch, and the next one
            goes on there.
        fraction: of the clients that take part in a round, above 0 to 1.
        share: tensors that clients share beside those of callbacks such as `CoLoRA`: names as in ``state_dict``, names
            of submodules, or patterns with ``*``.
        rules: how long a round waits, for how many clients, and what becomes of the rest. None: it waits for all of
            them, and a client that fails ends the run.
        privacy: what noise hides in what clients send, and how much they may tell. None: they send it without noise.
        wire: in which format clients and server write what they send each other: `Bfloat16`, `Int8`, `LargestChanges`.
            None: all numbers are sent as they are, in float32. Only what travels is rounded, after noise is added.
        store: where clients' private states lie between turns. None: in memory up to a cap, then on the local disk.
        dry_run: ``trainer.fit`` builds the models, looks at the places, says how many clients will run at a time and
            how long a round will take, and trains nothing.
        seed: of everything that is drawn: who takes part, and each client's random stream.

    Attributes:
        client_id: None here; in a client ``trainer.strategy.client_id`` is its id.

    Raises:
        ValueError: a number out of range, no clients, two of one id, or noise on updates of which the largest is sent.
        TypeError: an argument of another type.

    Example:
        >>> strategy = FederatedStrategy([Client("ward-3"), Client("ward-7")], share=["encoder"], local_epochs=2)
        >>> strategy.num_clients
        2
    """

    strategy_name = "federated"
    client_id: str | None = None

    def __init__(
        self,
        clients: int | Sequence[Client],
        *,
        aggregator: Aggregator | None = None,
        pool: ClientPool | None = None,
        local_epochs: int = 1,
        local_steps: int | None = None,
        fraction: float = 1.0,
        share: Sequence[str] = (),
        rules: RoundRules | None = None,
        privacy: Privacy | None = None,
        wire: WireFormat | None = None,
        store: ClientStore | None = None,
        dry_run: bool = False,
        seed: int = 0,
    ) -> None:
        self._clients_accelerator: Accelerator | None = None
        self.client_precision: Precision | None = None  # the driver itself computes nothing
        self.store = store or ClientStore()
        super().__init__("cpu", checkpoint_io=CheckpointFiles(self.store))
        for name, value, kind in (
            ("aggregator", aggregator, Aggregator),
            ("pool", pool, ClientPool),
            ("rules", rules, RoundRules),
            ("privacy", privacy, Privacy),
            ("wire", wire, WireFormat),
        ):
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"`{name}` must be a {kind.__name__}, but is {value!r}.")
        for name, number in (("local_epochs", local_epochs), ("local_steps", local_steps)):
            if number is not None and number < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {number}.")
        if not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise ValueError(f"`fraction` of clients per round must be above 0 and at most 1, but is {fraction}.")
        if isinstance(share, str):
            raise TypeError(f"`share` must be a sequence of names, but is one string. Write `share=[{share!r}]`.")
        if not isinstance(share, Sequence):
            raise TypeError(f"`share` must be a sequence of names, but is {share!r}.")
        if not isinstance(seed, int):
            raise TypeError(f"`seed` must be a whole number, but is {seed!r}.")
        if isinstance(wire, LargestChanges) and privacy is not None and privacy.updates is not None:
            raise ValueError(
                f"`Privacy(updates=...)` adds noise to every number, and `wire={wire!r}` would then send the numbers "
                "with the largest noise. Take `wire=Bfloat16()` or `Int8()`, which round what is noised."
            )
        self.clients = as_clients(clients)
        self.aggregator = aggregator
        self.pool: ClientPool = pool or RayPool()
        self.local_epochs = local_epochs
        self.local_steps = local_steps
        self.fraction = fraction
        self.share = tuple(share)
        self.rules = rules or RoundRules()
        self.privacy = privacy
        self.wire = wire
        self.dry_run = dry_run
        self.seed = seed
        self.parallel_devices: list[torch.device] | None = None  # Lightning fills it in, and the next one
        self.num_nodes = 1
        self.after_teardown: Callable[[], None] | None = None
        self.unbuilt: MutableMapping[L.LightningModule, L.LightningModule] = weakref.WeakKeyDictionary()
        self._template: tuple[weakref.ref[L.Trainer], ClientTemplate] | None = None
        self._state = ServerState([client.id for client in self.clients], self.store, privacy, wire)
        self._fitted: weakref.ref[L.LightningModule] | None = None
        self._rounds: Rounds | None = None

    # -- what users read -----------------------------------------------------------------------------------------------

    @property
    def client_ids(self) -> tuple[str, ...]:
        """Of all clients, in the user's order; the same in a client."""
        return tuple(client.id for client in self.clients)

    @property
    def num_clients(self) -> int:
        """How many there are."""
        return len(self.clients)

    @property
    def round(self) -> int | None:
        """The last round that was begun, from 0; None before the first."""
        return None if self._rounds is None else self._rounds.round

    @property
    def relevance(self) -> Sequence[RelevanceRecord]:
        """Who counted how much for whom, one record per round. Older ones are read from where the store keeps them."""
        return self._state.relevance

    @property
    def left_out(self) -> list[LeftOut]:
        """Whose turns did not count in which round, and why: rejected by the guard, failed, or late."""
        return list(self._state.left_out)

    @property
    def traffic(self) -> Mapping[str, Traffic]:
        """Bytes that travelled so far, by client id."""
        return dict(self._state.traffic)

    @property
    def traffic_by_round(self) -> list[RoundTraffic]:
        """Bytes that travelled in each round, by client and direction; all rounds are read, so ask once for many."""
        return self._state.traffic_by_round

    def epsilon(self, client_id: str) -> float:
        """What a client has told so far, at the delta of its budget (`Privacy`); 0 where nothing is noised.

        Raises:
            ValueError: no client of that name.
        """
        return self._state.ledgers.epsilon(self._known(client_id))

    @property
    def seconds(self) -> Mapping[str, float]:
        """How long each client's last training turn took, by client id, where it has had one in this process."""
        return {} if self._rounds is None else dict(self._rounds.seconds)

    def personalize(self, module: L.LightningModule, client_id: str, *, aggregated: bool = True) -> L.LightningModule:
        """One client's model, with its private state and what the server has for it.

        Args:
            module: that was handed to the Trainer; left alone.
            client_id: whose model.
            aggregated: with what the server has for it now; else as the client's last turn has left it, which is what
                the Co-LoRA paper scores.

        Returns:
            A module of its own, in evaluation mode.

        Raises:
            ValueError: no client of that name.
            FederationError: nothing has run yet.
        """
        return personalize(self._ran(), self._known(client_id), module, aggregated=aggregated)

    def experts(
        self,
        module: L.LightningModule,
        client_id: str,
        *,
        aggregated: bool = True,
        answering: Answering = Blend(),  # noqa: B008, frozen
    ) -> Experts:
        """One client's model, which answers each question with the adapters of those who trained on such questions.

        It needs `RoutingKeys` among the run's callbacks. To answer so, a client holds every other client's adapter and
        keys, which `Experts.nbytes` counts and `traffic` does not. Arguments are those of `personalize`, and:

        Args:
            answering: whose adapters answer a question: `Blend`, the mean of all that are near, or `Nearest`.

        Raises:
            ValueError: no client of that name, or one that has not trained yet.
            FederationError: nothing has run yet, or nothing has gathered keys.
        """
        return experts(self._ran(), self._known(client_id), module, aggregated=aggregated, answering=answering)

    def personalize_new(self, client: Client) -> Newcomer:
        """A model for a client that took no part, from the others' by the sketch of its task alone.

        One epoch of its training data (or `local_steps` of it) is sketched by the run's `RelevanceProbe`, nothing is
        trained, and the aggregator mixes what the clients have last sent as for one of them. Nothing changes for the
        others. It runs in this process.

        Args:
            client: with a model and a datamodule of its own; without, with those of the run.

        Returns:
            The module, and who counts how much in it.

        Raises:
            ValueError: it has the id of a client of the run; nobody has sent anything; it does not fit the others.
            FederationError: nothing has run yet, or the run is private: a newcomer has no budget and no key.

        Source:
            Co-LoRA, arXiv:2506.11024, adaptation to unseen tasks.
        """
        ran = self._ran()
        if self.privacy is not None:
            raise FederationError(
                f"This run hides what clients send (`privacy={self.privacy!r}`), but a newcomer's sketch would leave "
                f"`{client.id}` as it is. Make it a client of a run that goes on (`fit(ckpt_path=...)`), or mix for it "
                "without sketches."
            )
        if client.id.lower() in {known.id.lower() for known in self.clients}:
            raise ValueError(
                f"`{client.id}` is a client of this run. Its model is `personalize(module, '{client.id}')`; a newcomer "
                "needs an id of its own."
            )
        return personalize_new(ran, client, seed=self.seed)

    def export(self, client_id: str, path: str | os.PathLike[str]) -> Path:
        """Write what one client has learned to a folder: a PEFT adapter folder where there are adapters.

        Args:
            client_id: whose.
            path: the folder; made if missing.

        Returns:
            The folder.

        Raises:
            ValueError: no client of that name.
            FederationError: nothing has run yet.
        """
        return export(self._ran(), self._known(client_id), Path(path))

    def _known(self, client_id: str) -> str:
        ids = [client.id for client in self.clients]
        if client_id not in ids:
            raise ValueError(
                f"There is no client `{client_id}`. There are {ids[:20]}{' and more' if ids[20:] else ''}."
            )
        return client_id

    def _ran(self) -> Rounds:
        if self._rounds is None:
            raise FederationError(
                "Clients' models are not known yet. Call `trainer.fit`, or `trainer.validate(..., "
                "ckpt_path=...)` to load a run from a checkpoint."
            )
        return self._rounds

    # -- what the launcher asks for ------------------------------------------------------------------------------------

    def aggregator_for(self, callbacks: Sequence[L.Callback]) -> Aggregator:
        """The user's aggregator, or the one that fits the callbacks."""
        if self.aggregator is not None:
            return self.aggregator
        chosen: Aggregator
        if not any(isinstance(callback, Exchange) for callback in callbacks):
            chosen, why = FedAvg(), "only tensors named by `share=` are shared"
        elif any(isinstance(callback, SketchSource) for callback in callbacks):
            chosen, why = RelevanceAggregator(), "a callback sketches the clients' tasks"
        else:
            chosen, why = UniformAggregator(), "no callback sketches the clients' tasks"
        _LOG.info("Aggregating with `%s`, since %s. Pass `aggregator=` to choose.", type(chosen).__name__, why)
        return chosen

    def template_of(self, trainer: L.Trainer) -> ClientTemplate:
        """The clients' Trainer: what the driver's was before it first ran."""
        if self._template is None or self._template[0]() is not trainer:
            self._template = weakref.ref(trainer), ClientTemplate.take(trainer)
        return self._template[1]

    def state_for(self, trainer: L.Trainer, module: L.LightningModule, stage: TrainerFn) -> ServerState:
        """What is known so far; nothing, if this is a new run."""
        goes_on = self._fitted is not None and self._fitted() is module
        if stage is TrainerFn.FITTING:
            if not goes_on or trainer.current_epoch == 0:
                self.store.close()
                self._state = ServerState([client.id for client in self.clients], self.store, self.privacy, self.wire)
            self._fitted = weakref.ref(module)
        return self._state

    def begin(self, rounds: Rounds) -> None:
        """Keep a launch's plan for `personalize` and `export`; the one before is not needed any more."""
        if self._rounds is not None:
            self._rounds.plan.file.close()
        self._rounds = rounds

    # -- what Lightning asks for ---------------------------------------------------------------------------------------

    @property
    @override
    def accelerator(self) -> Accelerator | None:
        return self._clients_accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator) -> None:
        # kept apart from Lightning's own attribute, which would refuse a second Trainer for this strategy
        self._clients_accelerator = accelerator

    @property
    @override
    def precision_plugin(self) -> Precision:
        return Precision()

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        self.client_precision = precision_plugin

    @override
    def _configure_launcher(self) -> None:
        self._launcher = FederatedLauncher(self)

    @override
    def setup_environment(self) -> None:
        """The accelerator is the clients'; the driver has nothing to set up on it."""

    @override
    def setup_optimizers(self, trainer: L.Trainer) -> None:
        """No optimizer runs on the driver, on purpose."""
        self.optimizers = [MockOptimizer()]
        self.lr_scheduler_configs = []

    @override
    def teardown(self) -> None:
        super().teardown()
        if self.after_teardown is not None:
            after, self.after_teardown = self.after_teardown, None
            after()


StrategyRegistry.register(
    FederatedStrategy.strategy_name,
    FederatedStrategy,
    description="Two federated clients; for more, pass a `FederatedStrategy` to the Trainer.",
    clients=2,
)
