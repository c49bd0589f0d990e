"""`ClientTemplate`: the Trainer that clients start from, as it was before anything ran.

It is taken at a Trainer's first launch and used for all later ones: once a Trainer has run, its loops and results carry
the driver's history, which a client must not inherit.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import cloudpickle  # type: ignore[import-untyped, unused-ignore]
import lightning as L

from lightning_pfl.federation._compat import equip, stripped
from lightning_pfl.federation.client_strategy import ClientStrategy
from lightning_pfl.federation.forwarding import ForwardingLogger
from lightning_pfl.federation.scope import of_clients

__all__ = ["ClientTemplate"]


@final
@dataclass(frozen=True)
class ClientTemplate:
    """A pickled Trainer without callbacks, loggers and strategy.

    Attributes:
        pickled: its bytes.
    """

    pickled: bytes

    @staticmethod
    def take(trainer: L.Trainer) -> ClientTemplate:
        """Pickle a Trainer that has not run yet; it is left as it was."""
        with stripped(trainer):
            return ClientTemplate(cloudpickle.dumps(trainer))

    def equip(
        self,
        strategy: ClientStrategy,
        *,
        callbacks: Sequence[L.Callback],
        save_dir: str | None,
        has_logger: bool,
        max_epochs: int | None,
        min_epochs: int | None,
    ) -> L.Trainer:
        """A fresh Trainer for clients.

        Args:
            strategy: of the client.
            callbacks: of the driver's Trainer; those of clients are taken, as they are.
            save_dir: where the run's logs lie.
            has_logger: whether the driver's Trainer has loggers.
            max_epochs: rounds of the run; -1: no limit; None: Lightning's default.
            min_epochs: fewest rounds of the run.
        """
        trainer: L.Trainer = pickle.loads(self.pickled)
        fewest, most, steps = min_epochs, max_epochs, trainer.fit_loop.epoch_loop.max_steps
        if strategy.local_steps is not None:
            rounds = 1000 if max_epochs is None else max_epochs  # Lightning's default
            fewest, most, steps = 0, -1, -1 if rounds == -1 else rounds * strategy.local_steps
        elif strategy.local_epochs is not None:
            fewest = None if fewest is None else fewest * strategy.local_epochs
            most = most if most in (None, -1) else most * strategy.local_epochs
        equip(
            trainer,
            strategy=strategy,
            callbacks=of_clients(callbacks),
            loggers=[ForwardingLogger(save_dir)] if has_logger else [],
            limits=(fewest, most, steps),
        )
        return trainer
