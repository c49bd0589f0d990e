"""`FederatedLauncher`: turns ``trainer.fit`` on the driver into rounds, and leaves the Trainer as a user expects it.

Lightning hands a launcher the Trainer's own function and its arguments. This one makes the plan, starts the pool, and
then runs that very function over a `ServerModule` instead of the user's module.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, final

import lightning as L
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_pfl.federation._compat import Launcher, adopt, attach_datamodule, become_server, callbacks_of
from lightning_pfl.federation.checks import (
    check_aggregator,
    check_last_checkpoint,
    check_trainer,
    require_lightning,
)
from lightning_pfl.federation.client_strategy import ClientStrategy
from lightning_pfl.federation.forecast import forecast
from lightning_pfl.federation.plan import make_plan
from lightning_pfl.federation.privacy import prepare_privacy
from lightning_pfl.federation.progress import Progress
from lightning_pfl.federation.rounds import Rounds
from lightning_pfl.federation.schedule import wanted
from lightning_pfl.federation.scope import of_clients, of_server
from lightning_pfl.federation.server import ServerModule
from lightning_pfl.federation.sharing import exchange_of
from lightning_pfl.federation.sources import ClientData

if TYPE_CHECKING:
    from lightning_pfl.federation.strategy import FederatedStrategy

__all__ = ["FederatedLauncher"]

_LOG = logging.getLogger(__name__)
_ONE_ROUND = [0]  # the data of the driver's loops: one batch is one round


@final
class FederatedLauncher(Launcher):
    """Runs the Trainer's functions as a federation.

    Args:
        strategy: whose clients they are.
    """

    def __init__(self, strategy: FederatedStrategy) -> None:
        self._strategy = strategy
        self._rounds: Rounds | None = None
        self._told_to_end = False

    @property
    def is_interactive_compatible(self) -> bool:
        """Nothing is forked, so notebooks are fine."""
        return True

    def launch(self, function: Callable[..., Any], *args: Any, trainer: L.Trainer | None = None, **kwargs: Any) -> Any:
        """Run ``trainer.fit``, ``validate``, ``test`` or ``predict`` as a federation.

        Args:
            function: the Trainer's own implementation.
            args: its arguments.
            trainer: the driver's.
            kwargs: its keyword arguments.
        """
        assert trainer is not None
        asked = inspect.signature(function).bind(*args, **kwargs).arguments
        stage = trainer.state.fn
        assert stage is not None
        if asked.get("ckpt_path") == "last":
            check_last_checkpoint(trainer)
        module, data = asked["model"] or trainer.lightning_module, _data(asked, stage)
        rounds = self._prepare(trainer, module, data, stage)
        self._told_to_end = False
        try:
            with self._places(rounds, trainer):
                if self._strategy.dry_run:
                    trainer.state.status, trainer.training = TrainerStatus.FINISHED, False
                    return None if stage is TrainerFn.FITTING else []
                return self._serve(function, asked, trainer, rounds, module, data.datamodule)
        except SystemExit as error:
            if self._told_to_end and not isinstance(error, SIGTERMException):
                raise SIGTERMException from error  # Ray makes a plain `SystemExit` of it, with an exit code of its own
            raise

    def kill(self, signum: Any) -> None:
        """Leave a round that is waiting for clients; a checkpoint then has the last whole round."""
        if self._rounds is not None and self._rounds.waiting:
            self._told_to_end = True
            raise SIGTERMException

    def _prepare(self, trainer: L.Trainer, module: L.LightningModule, data: ClientData, stage: TrainerFn) -> Rounds:
        strategy = self._strategy
        check_trainer(trainer, stage)
        for given in (data.datamodule, *data.loaders.values()):
            require_lightning(given, "The datamodule")
        callbacks = of_clients(callbacks_of(trainer))
        exchange = exchange_of(callbacks, strategy.share)
        aggregator = strategy.aggregator_for(callbacks)
        check_aggregator(aggregator, callbacks)
        template = strategy.template_of(trainer)
        if stage is TrainerFn.FITTING:
            prepare_privacy(strategy.privacy, callbacks, trainer.max_epochs)

        def client_trainer() -> L.Trainer:
            return template.equip(
                ClientStrategy(
                    client_ids=strategy.client_ids,
                    share=strategy.share,
                    local_epochs=None if strategy.local_steps is not None else strategy.local_epochs,
                    local_steps=strategy.local_steps,
                    accelerator=trainer.accelerator,
                    devices=strategy.parallel_devices,
                    precision=strategy.client_precision,
                ),
                callbacks=callbacks,
                save_dir=trainer.log_dir,
                has_logger=bool(trainer.loggers),
                max_epochs=trainer.max_epochs,
                min_epochs=trainer.min_epochs,
            )

        plan = make_plan(
            strategy.clients,
            module,
            data,
            trainer=trainer,
            callbacks=callbacks,
            exchange=exchange,
            global_branch=aggregator.uses_global_branch,
            client_trainer=client_trainer,
            unbuilt=strategy.unbuilt,
            seed=strategy.seed,
        )
        if len(plan.samples) > 1:
            aggregator.aggregate(
                list(plan.samples.values()), {}
            )  # what cannot be mixed comes to light before anything runs
        state = strategy.state_for(trainer, module, stage)
        return Rounds(
            plan,
            state,
            pool=strategy.pool,
            aggregator=aggregator,
            exchange=exchange,
            fraction=strategy.fraction,
            rules=strategy.rules,
            seed=strategy.seed,
            tell=Progress(trainer, strategy.pool, lambda: state.bytes_so_far),
            seconds=strategy.seconds,
        )

    @contextlib.contextmanager
    def _places(self, rounds: Rounds, trainer: L.Trainer) -> Iterator[None]:
        """The pool, started unless nothing is to run; closed whatever happens."""
        strategy, pool = self._strategy, self._strategy.pool
        clients = rounds.plan.clients
        try:
            room = pool.look(clients)
            if trainer.state.fn is TrainerFn.FITTING:
                count = wanted(len(clients), strategy.fraction)
                plan = forecast(clients, room, num_clients=count, seconds=strategy.seconds)
                logging.getLogger("lightning.pytorch").info(f"Federation: {plan}.")
            if not strategy.dry_run:
                pool.start(clients, rounds.plan.snapshots)
            yield
        finally:
            pool.close()

    def _serve(
        self,
        function: Callable[..., Any],
        asked: Mapping[str, Any],
        trainer: L.Trainer,
        rounds: Rounds,
        module: L.LightningModule,
        datamodule: L.LightningDataModule | None,
    ) -> Any:
        strategy, stage = self._strategy, trainer.state.fn
        fitting = stage is TrainerFn.FITTING
        serving = of_server(callbacks_of(trainer))
        summaries = [callback for callback in serving if isinstance(callback, ModelSummary)]
        server = ServerModule(
            module,
            rounds,
            validating=rounds.plan.validating,
            training=fitting,
            summaries=summaries,
        )
        put_back_settings = become_server(
            trainer,
            callbacks=[callback for callback in serving if callback not in summaries],
            validates=not fitting or (trainer.limit_val_batches != 0 and bool(rounds.plan.validating)),
        )
        self._rounds = rounds
        strategy.begin(rounds)

        def put_back() -> None:
            self._rounds = None
            put_back_settings()
            adopt(strategy, module)
            module.trainer = trainer
            if datamodule is not None:
                attach_datamodule(trainer, datamodule)

        adopt(strategy, server)
        call = dict(asked)
        call["model"] = None if asked["model"] is None else server
        call |= {
            name: None for name in ("datamodule", "train_dataloaders", "val_dataloaders", "dataloaders") if name in call
        }
        call |= (
            {"train_dataloaders": _ONE_ROUND, "val_dataloaders": _ONE_ROUND} if fitting else {"dataloaders": _ONE_ROUND}
        )
        try:
            result = function(**call)
        except BaseException:
            strategy.after_teardown = put_back  # Lightning first tells callbacks, which may save a checkpoint
            raise
        put_back()
        return result[0] if stage is TrainerFn.PREDICTING and result else result


def _data(asked: Mapping[str, Any], stage: TrainerFn) -> ClientData:
    """Where data comes from, from the arguments of ``fit``, ``validate``, ``test`` or ``predict``."""
    datamodule = asked.get("datamodule")
    if stage is TrainerFn.FITTING:
        loaders = {"train": asked.get("train_dataloaders"), "val": asked.get("val_dataloaders")}
    else:
        loaders = {"val" if stage is TrainerFn.VALIDATING else stage.value: asked.get("dataloaders")}
    for name, value in loaders.items():
        if isinstance(value, L.LightningDataModule):
            datamodule, loaders = value, {name: None}
            break
    given = {name: value for name, value in loaders.items() if value is not None}
    if datamodule is not None and given:
        raise ValueError("Give the Trainer either a datamodule or dataloaders, not both.")
    return ClientData(datamodule, given)
