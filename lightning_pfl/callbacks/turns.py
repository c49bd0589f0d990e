"""`steps_of_turn`: how long a client's turn is, for methods that divide it or do something at its end."""

from __future__ import annotations

from math import ceil

import lightning as L

__all__ = ["steps_of_turn"]


def steps_of_turn(trainer: L.Trainer) -> int:
    """How many optimizer steps a client takes in this turn; without a federation, in the whole fit.

    Args:
        trainer: of the client, while it trains.
    """
    steps, epochs = (getattr(trainer.strategy, name, None) for name in ("local_steps", "local_epochs"))
    if steps is not None:
        return int(steps)
    if epochs is None:
        return int(trainer.estimated_stepping_batches)
    return int(epochs) * ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
