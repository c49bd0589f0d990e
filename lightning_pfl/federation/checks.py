"""What is refused before anything starts, with the reason."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import lightning as L
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.trainer.states import TrainerFn

from lightning_pfl.aggregation import Aggregator
from lightning_pfl.callbacks.federated import KeySource, SketchSource
from lightning_pfl.errors import CheckpointMismatchError
from lightning_pfl.federation._compat import callbacks_of, is_dry_run, last_checkpoints

__all__ = ["check_aggregator", "check_last_checkpoint", "check_trainer", "require_lightning"]

_LOG = logging.getLogger(__name__)


def require_lightning(thing: object, name: str) -> None:
    """Refuse objects of the other package that holds the same code.

    Raises:
        TypeError: the object's class comes from ``pytorch_lightning``.
    """
    foreign = [base for base in type(thing).__mro__ if base.__module__.split(".")[0] == "pytorch_lightning"]
    if foreign:
        raise TypeError(
            f"{name} is a {type(thing).__name__} made from `pytorch_lightning`, which is another package with the same "
            "code, and its classes are not those of `lightning`. Change the import to `import lightning.pytorch as pl`."
        )


def check_trainer(trainer: L.Trainer, stage: TrainerFn) -> None:
    """Refuse what has no meaning in rounds.

    Raises:
        ValueError: ``max_steps``, ``num_nodes``, or a callback that searches for a batch size or a learning rate.
        TypeError: a callback or logger from ``pytorch_lightning``.
    """
    if trainer.num_nodes > 1:
        raise ValueError(
            f"`Trainer(num_nodes={trainer.num_nodes})` starts one program per node, but a federation is one program "
            "that hands clients out. Leave it at 1, and name a cluster: `FederatedStrategy(pool=RayPool(address=...))`."
        )
    if (devices := getattr(trainer.strategy, "parallel_devices", None)) is not None and len(devices) > 1:
        _LOG.warning(
            "The Trainer has %d devices, but each client trains on one. What a client takes of a machine is said by "
            "`Client(num_gpus=...)`; clients on several devices work at the same time.",
            len(devices),
        )
    for logger in trainer.loggers:
        require_lightning(logger, f"The logger {type(logger).__name__}")
    for callback in callbacks_of(trainer):
        require_lightning(callback, f"The callback {type(callback).__name__}")
        if isinstance(callback, (BatchSizeFinder, LearningRateFinder)) and stage is TrainerFn.FITTING:
            raise ValueError(
                f"`{type(callback).__name__}` would search anew in every client and every round. Search once with a "
                "Trainer without the federated strategy, and give the module what was found."
            )
    sources = [type(callback).__name__ for callback in callbacks_of(trainer) if isinstance(callback, SketchSource)]
    if len(sources) > 1:
        raise ValueError(f"A client sends one sketch of its task, but {sources} each make one. Keep one of them.")
    keyed = [type(callback).__name__ for callback in callbacks_of(trainer) if isinstance(callback, KeySource)]
    if len(keyed) > 1:
        raise ValueError(f"A client has one set of keys of its questions, but {keyed} each make one. Keep one of them.")
    if stage is not TrainerFn.FITTING or is_dry_run(trainer):
        return
    if trainer.max_steps != -1:
        raise ValueError(
            f"`Trainer(max_steps={trainer.max_steps})` counts optimizer steps, but the driver's loop counts "
            "rounds. Use `max_epochs` for the number of rounds, and `FederatedStrategy(local_steps=...)` for steps "
            "within one."
        )


def check_last_checkpoint(trainer: L.Trainer) -> None:
    """Refuse ``ckpt_path="last"`` where there is none; Lightning only warns, and starts from zero.

    Raises:
        CheckpointMismatchError: there is no last checkpoint.
    """
    found, folders = last_checkpoints(trainer)
    if not found:
        where = sorted(folders) or "any folder"
        raise CheckpointMismatchError(
            f'`ckpt_path="last"` asks to go on, but there is no last checkpoint in {where}, and a run must not start '
            "from zero unnoticed. Give the Trainer a `ModelCheckpoint(dirpath=..., save_last=True)` with the folder of "
            "the run that is to go on, or name a file; to start anew, leave `ckpt_path` out."
        )


def check_aggregator(aggregator: Aggregator, callbacks: Sequence[L.Callback]) -> None:
    """Refuse a rule that needs what nobody makes, or that does not go with what somebody makes.

    Raises:
        ValueError: it needs relevance sketches and there is no probe; it sends a global adapter, and questions are to
            be routed.
    """
    keyed = next((type(callback).__name__ for callback in callbacks if isinstance(callback, KeySource)), None)
    if keyed is not None and aggregator.uses_global_branch:
        raise ValueError(
            f"`{keyed}` is for answering with another client's adapter in the place of one's own, but under "
            f"`{type(aggregator).__name__}` a client's model is its own adapter and a global one beside it, so that "
            "neither answers alone. Take a rule without a global branch, or leave the callback out."
        )
    if aggregator.needs_sketches and not any(isinstance(callback, SketchSource) for callback in callbacks):
        raise ValueError(
            f"`{type(aggregator).__name__}` weighs clients by sketches of their tasks, but no callback makes any. Add "
            "`RelevanceProbe(...)` to `Trainer(callbacks=...)`, or use `UniformAggregator()`."
        )
