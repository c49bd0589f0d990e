"""Every private name of Lightning that federation leans on, read in lightning 2.6 (the bound in pyproject.toml).

Nothing else in this package may touch a name of Lightning that starts with an underscore. Each function says what it
replaces, so that a new release of Lightning can be checked against this one file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.optimization.automatic import Closure
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torchmetrics import Metric

__all__ = [
    "DataFetcher",
    "DataLoaderIterFetcher",
    "FitLoop",
    "Launcher",
    "MockOptimizer",
    "TrainingEpochLoop",
    "adopt",
    "attach_datamodule",
    "become_server",
    "callbacks_of",
    "copy_hparams_flags",
    "equip",
    "is_dry_run",
    "is_overridden",
    "last_checkpoints",
    "leave",
    "loaders",
    "log_under_any_name",
    "merge_results",
    "metric_states",
    "metrics_to_carry",
    "not_restarting",
    "place",
    "quiet",
    "restore_metric_states",
    "restore_metrics",
    "results_to_carry",
    "resume_from_memory",
    "set_restarting",
    "skip_prepare_data",
    "stripped",
    "updated_metrics",
]

FitLoop = _FitLoop
TrainingEpochLoop = _TrainingEpochLoop
DataFetcher = _DataFetcher
DataLoaderIterFetcher = _DataLoaderIterDataFetcher
Launcher = _Launcher
MockOptimizer = _MockOptimizer

_NO_LOSS = "`training_step` returned `None`. If this was on purpose, ignore this warning..."
_CONNECTOR_METRICS = ("_callback_metrics", "_progress_bar_metrics", "_logged_metrics")


def not_restarting(loop: _Loop) -> None:
    """Tell a loop and its children that a restart is over, as ``on_iteration_done`` does after the first iteration."""
    loop._restarting = False
    loop._loaded_from_state_dict = False
    loop._resuming_from_checkpoint = False
    for child in vars(loop).values():
        if isinstance(child, _Loop):
            not_restarting(child)


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """The Trainer's own list, which it does not declare."""
    return cast(list[L.Callback], cast(Any, trainer).callbacks)


def is_dry_run(trainer: L.Trainer) -> bool:
    """Whether ``fast_dev_run`` is on, which the Trainer does not declare."""
    return bool(cast(Any, trainer).fast_dev_run)


def attach_datamodule(trainer: L.Trainer, datamodule: L.LightningDataModule) -> None:
    """Let Trainer and datamodule know each other."""
    cast(Any, trainer).datamodule = datamodule
    datamodule.trainer = trainer


def last_checkpoints(trainer: L.Trainer) -> tuple[set[str], set[str]]:
    """What ``ckpt_path="last"`` chooses from, as ``_CheckpointConnector._parse_ckpt_path`` does, and where it looks."""
    found: set[str] = set()
    folders: set[str] = set()
    for callback in callbacks_of(trainer):
        if isinstance(callback, ModelCheckpoint):
            found |= callback._find_last_checkpoints(trainer)
            folders.add(str(cast(Any, callback)._ModelCheckpoint__resolve_ckpt_dir(trainer)))
        elif isinstance(callback, OnExceptionCheckpoint) and os.path.exists(callback.ckpt_path):
            found.add(callback.ckpt_path)
    return found, folders


def set_restarting(loop: _Loop, restarting: bool) -> None:
    """Set a loop's and its children's flag, without what `_FitLoop` makes of it."""
    cast(Any, _Loop.restarting).fset(loop, restarting)


def leave(trainer: L.Trainer) -> None:
    """End a ``fit`` early, without ``on_train_end``, ``on_fit_end`` and ``teardown``, as a preempted job does."""
    trainer._teardown()
    trainer.training = False
    trainer.state.status = TrainerStatus.FINISHED
    trainer.state.stage = None


def loaders(loop: _FitLoop) -> list[Any]:
    """The training dataloaders, flattened; empty before they were asked for."""
    return [] if loop._combined_loader is None else list(loop._combined_loader.flattened)


def training_batches(trainer: L.Trainer, module: L.LightningModule) -> Iterator[tuple[int, Any]]:
    """One epoch's batches as ``training_step`` would receive them, with their indices, while nothing is trained.

    The Trainer's count of optimizer steps goes on as if each were one, since callbacks go by it.
    """
    loop: Any = trainer.fit_loop
    loop.setup_data()
    if module.automatic_optimization:
        steps = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    else:
        steps = loop.epoch_loop.manual_optimization.optim_step_progress.total
    for batch, index, _ in iter(loop._combined_loader or ()):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield index, trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        if (index + 1) % trainer.accumulate_grad_batches == 0:
            steps.completed += 1


def metrics_to_carry(trainer: L.Trainer) -> dict[str, dict[str, Tensor]]:
    """What ``trainer.callback_metrics`` and its siblings hold; a plateau scheduler may read it an epoch later."""
    connector = trainer._logger_connector
    assert connector.callback_metrics is not None  # reading it folds the running results in
    return {
        name: {key: torch.as_tensor(value).detach().cpu().clone() for key, value in getattr(connector, name).items()}
        for name in _CONNECTOR_METRICS
    }


def restore_metrics(trainer: L.Trainer, carried: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put back what `metrics_to_carry` took."""
    for name, metrics in carried.items():
        getattr(trainer._logger_connector, name).update(metrics)


def results_to_carry(loop: _TrainingEpochLoop) -> dict[str, dict[str, Tensor]]:
    """What the epoch's means, sums and extremes (``self.log(..., on_epoch=True)``) have gathered so far, by key."""
    carried = {}
    for key, result in loop._results.items():
        if result.is_tensor and result.meta.on_epoch and not result.has_reset:
            carried[key] = {"value": result.value.detach().cpu().clone()}
            if result.meta.is_mean_reduction:
                carried[key]["weight"] = result.cumulated_batch_size.detach().cpu().clone()
    return carried


def merge_results(loop: _TrainingEpochLoop, carried: dict[str, dict[str, Tensor]]) -> None:
    """Add what `results_to_carry` took to results that were logged again since; those are taken off ``carried``."""
    for key in [key for key in carried if key in loop._results and not loop._results[key].has_reset]:
        result, before = loop._results[key], carried.pop(key)
        value = before["value"].to(result.value.device)
        if result.meta.is_mean_reduction:
            result.value = value + result.value
            result.cumulated_batch_size = before["weight"].to(value.device) + result.cumulated_batch_size
        elif result.meta.is_sum_reduction:
            result.value = value + result.value
        else:
            result.value = result.meta.reduce_fx(value, result.value)
        result._computed = None


def metric_states(module: L.LightningModule) -> dict[str, dict[str, Any]]:
    """The running states of the torchmetrics that a module holds; they are in no ``state_dict``."""
    return {
        name: {"state": dict(metric.metric_state), "count": metric.update_count}
        for name, metric in module.named_modules()
        if isinstance(metric, Metric) and metric.update_count
    }


def restore_metric_states(module: L.LightningModule, carried: Mapping[str, Mapping[str, Any]]) -> None:
    """Put back what `metric_states` took."""
    for name, metric in module.named_modules():
        if isinstance(metric, Metric) and name in carried:
            for key, value in carried[name]["state"].items():
                setattr(metric, key, move_data_to_device(value, metric.device))
            metric._update_count = carried[name]["count"]
            metric._computed = None


def updated_metrics(trainer: L.Trainer, before: Mapping[str, Any]) -> dict[str, Any]:
    """The callback metrics that are other objects than in ``before``: those logged since."""
    return {key: value for key, value in trainer.callback_metrics.items() if before.get(key) is not value}


def resume_from_memory(trainer: L.Trainer, path: str) -> None:
    """Let ``fit(ckpt_path=path)`` take what the strategy has, without Lightning's patches for earlier releases.

    `_CheckpointConnector.resume_start` brings removed modules and classes back for as long as it reads, and tries
    all migrations; a checkpoint that this very release has made needs neither. Other paths are read as ever, and so is
    a checkpoint of another release.
    """
    connector = cast(Any, trainer)._checkpoint_connector
    connector.resume_start = partial(_resume_start, trainer, path)


def _resume_start(
    trainer: Any, memory: str, checkpoint_path: Any | None = None, weights_only: bool | None = None
) -> None:
    connector = trainer._checkpoint_connector
    if checkpoint_path == memory:
        checkpoint = trainer.strategy.load_checkpoint(memory)
        if checkpoint["pytorch-lightning_version"] == L.__version__:
            connector._ckpt_path, connector._loaded_checkpoint = memory, checkpoint
            return
    type(connector).resume_start(connector, checkpoint_path, weights_only)


def skip_prepare_data(trainer: L.Trainer) -> None:
    """The driver has called ``prepare_data`` already; clients must not."""
    cast(Any, trainer._data_connector).prepare_data = _do_nothing


def _do_nothing() -> None:
    """Picklable."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's INFO lines ("Restoring states from ...") of a client's turn out of the log, unless asked for.

    Through a filter that stays: changing a level empties the caches of all loggers, each time.
    """
    for package in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):  # whichever was imported last speaks
        logger = logging.getLogger(f"{package}.utilities.rank_zero")
        if _QUIET not in logger.filters:
            logger.addFilter(_QUIET)
    _QUIET.turns += 1
    try:
        yield
    finally:
        _QUIET.turns -= 1


class _Quiet(logging.Filter):
    turns = 0

    def filter(self, record: logging.LogRecord) -> bool:
        return (
            not self.turns
            or record.levelno > logging.INFO
            or logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
        )


_QUIET = _Quiet()


def place(
    accelerator: Accelerator | None, precision: Precision | None, devices: list[torch.device] | None
) -> tuple[torch.device, Accelerator, Precision]:
    """Where a client computes: on the Trainer's accelerator if this process has it, else on the CPU.

    The precision plugin was built for the driver's device, so it is built anew when the device differs.
    """
    device = torch.device("cpu")
    if isinstance(accelerator, CUDAAccelerator) and torch.cuda.is_available():
        wanted = devices[0].index if devices and isinstance(devices[0], torch.device) else 0
        device = torch.device("cuda", wanted if wanted is not None and wanted < torch.cuda.device_count() else 0)
    elif isinstance(accelerator, MPSAccelerator) and torch.backends.mps.is_available():
        device = torch.device("mps", 0)
    if device.type == "cpu":
        accelerator = CPUAccelerator()
    assert accelerator is not None
    precision = precision or Precision()
    if isinstance(precision, MixedPrecision) and precision.device != device.type:
        kind = "bf16-mixed" if device.type == "cpu" else precision.precision
        precision = MixedPrecision(kind, device.type)  # type: ignore[arg-type]
    return device, accelerator, precision


@contextmanager
def stripped(trainer: Any) -> Iterator[None]:
    """Take off a Trainer what clients must not inherit, so that it can be pickled; put it back afterwards.

    That is: callbacks, loggers, the profiler and the strategy, which holds the whole federation.
    """
    connector = trainer._accelerator_connector
    before = trainer.callbacks, trainer._loggers, trainer.profiler, connector.strategy, connector._strategy_flag
    trainer.callbacks, trainer._loggers, trainer.profiler = [], [], PassThroughProfiler()
    connector.strategy, connector._strategy_flag = SingleDeviceStrategy(), "auto"
    try:
        yield
    finally:
        trainer.callbacks, trainer._loggers, trainer.profiler, connector.strategy, connector._strategy_flag = before


def equip(
    trainer: Any,
    *,
    strategy: Strategy,
    callbacks: list[L.Callback],
    loggers: list[Logger],
    limits: tuple[int | None, int | None, int],
) -> None:
    """Give a stripped Trainer what a client has.

    Args:
        trainer: changed in place.
        strategy: of the client.
        callbacks: of the client.
        loggers: of the client.
        limits: ``min_epochs``, ``max_epochs`` and ``max_steps`` of the client's whole fit.
    """
    trainer._accelerator_connector.strategy = strategy
    trainer.callbacks, trainer._loggers = callbacks, loggers
    trainer.fit_loop.min_epochs, trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = limits


def become_server(trainer: L.Trainer, *, callbacks: list[L.Callback], validates: bool) -> Callable[[], None]:
    """Make a Trainer's own settings those of the driver's loop: one step an epoch, on data that means nothing.

    Returns:
        What puts everything back. Call it when the loop is over; after an exception only when Lightning has handled
        that, since callbacks that save on exceptions must still find the server.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    settings: dict[str, Any] = {
        "callbacks": callbacks,
        "datamodule": None,
        "accumulate_grad_batches": 1,
        "gradient_clip_val": None,
        "limit_train_batches": 1.0,
        "limit_val_batches": 1.0 if validates else 0,
        "limit_test_batches": 1.0,
        "limit_predict_batches": 1.0,
        "overfit_batches": 0.0,
        "val_check_interval": 1.0,
        "_val_check_time_interval": None,
        "num_sanity_val_steps": 0,
        "reload_dataloaders_every_n_epochs": 0,
        "log_every_n_steps": 1,
    }
    before = {name: getattr(trainer, name) for name in settings}
    steps = epoch_loop.max_steps
    for name, value in settings.items():
        setattr(trainer, name, value)
    epoch_loop.max_steps = -1
    warned = _NO_LOSS in Closure.warning_cache
    Closure.warning_cache.add(_NO_LOSS)  # a round computes no loss, on purpose

    def put_back() -> None:
        if not warned:
            Closure.warning_cache.discard(_NO_LOSS)
        for name, value in before.items():
            setattr(trainer, name, value)
        epoch_loop.max_steps = steps

    return put_back


def adopt(strategy: Strategy, module: L.LightningModule) -> None:
    """Make a module the one that ``trainer.lightning_module`` returns."""
    strategy._lightning_module = module
    strategy.model = module


def copy_hparams_flags(source: L.LightningModule, target: L.LightningModule) -> None:
    """What Lightning reads of a module's hyperparameters beside ``hparams`` and ``hparams_initial``."""
    target._log_hyperparams = source._log_hyperparams
    if hasattr(source, "_hparams_name"):
        target._hparams_name = source._hparams_name


def log_under_any_name(trainer: Any, name: str, value: Tensor) -> None:
    """What ``self.log`` does at the end of an epoch, for names that it refuses."""
    connector = trainer._logger_connector
    connector._callback_metrics[name] = value
    connector._progress_bar_metrics[name] = value
    connector.log_metrics({name: value})
