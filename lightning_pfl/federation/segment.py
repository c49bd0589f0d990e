"""`SegmentLoop`: a part of one long ``Trainer.fit``, left the way a preempted job leaves and continued bit for bit.

A client's turn is a real fit that starts from the checkpoint of its last turn. Lightning's own resume restores weights,
optimizers, schedulers, callbacks and progress. What it leaves out is carried here: the random generators at the very
place in the loop, those of dataloaders, the metrics that plateau schedulers read, and the place inside an epoch.
``max_epochs`` stays at the full horizon, so that schedules are sized as in one long fit, and ``on_train_end``,
``on_fit_end`` and ``teardown`` run once, when the horizon is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from lightning.fabric.utilities.types import _Stateful
from torch import Tensor
from typing_extensions import override

from lightning_pfl.federation import random_state
from lightning_pfl.federation._compat import (
    DataFetcher,
    DataLoaderIterFetcher,
    FitLoop,
    TrainingEpochLoop,
    loaders,
    merge_results,
    metric_states,
    metrics_to_carry,
    not_restarting,
    restore_metric_states,
    restore_metrics,
    results_to_carry,
    set_restarting,
)

__all__ = ["SegmentEnd", "SegmentLoop"]


class SegmentEnd(Exception):
    """The segment is over, the fit is not. Never leaves a client's turn."""


class SegmentLoop(FitLoop):
    """Lightning's fit loop, for a budget of epochs or optimizer steps instead of all of them.

    Args:
        trainer: of the client; its ``fit_loop`` is taken over, limits included.
        epochs: how many epochs to run. None: count steps.
        steps: how many optimizer steps to run; the segment may end inside an epoch.
        carried: what the last segment handed to ``save``; None in the first.
        save: called once when the segment ends, with what the next one needs beside Lightning's checkpoint; must save
            that checkpoint too. Not called when there was nothing to run: the fit's end was reached earlier, or a
            callback of the client's own has stopped its training.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        *,
        epochs: int | None,
        steps: int | None,
        carried: Mapping[str, Any] | None,
        save: Callable[[dict[str, Any]], None],
    ) -> None:
        was = trainer.fit_loop
        super().__init__(trainer, min_epochs=was.min_epochs, max_epochs=was.max_epochs)
        self.epoch_loop = SegmentEpochLoop(trainer, min_steps=was.min_steps, max_steps=was.max_steps)
        self._epochs = epochs
        self._steps = steps
        self._carried = carried
        self._save = save
        self._epochs_run = 0
        self._first_step = 0
        self._at_iterator: dict[str, Any] = {}
        self._at_first_batch: dict[str, Any] = {}
        self._results_before: dict[str, dict[str, Tensor]] = {}

    @property
    def segment_done(self) -> bool:
        """Whether the budget is used up."""
        if self._epochs is not None:
            return self._epochs_run >= self._epochs
        return self._steps is not None and self.epoch_loop.global_step - self._first_step >= self._steps

    @property
    @override
    def done(self) -> bool:
        return self.segment_done or bool(super().done)

    @property
    @override
    def restarting(self) -> bool:
        return self._restarting

    @restarting.setter
    def restarting(self, restarting: bool) -> None:
        # Lightning also calls it a restart when training is limited by steps, and would then not reshuffle
        progress: Any = self.epoch_progress.current
        inside = (progress.ready, progress.started) != (progress.processed, progress.processed)
        set_restarting(self, restarting and inside)

    @override
    def run(self) -> None:
        if self._carried is not None:
            if self._carried["stopped"]:
                self.setup_data()  # how much data there is counts for others, too
                return
            restore_metrics(self.trainer, self._carried["metrics"])
            restore_metric_states(self.trainer.lightning_module, self._carried["metric_states"])
            self.trainer.accumulate_grad_batches = self._carried["accumulate_grad_batches"]
            for name, parameter in self.trainer.lightning_module.named_parameters():
                if (gradient := self._carried["gradients"].get(name)) is not None:
                    parameter.grad = gradient.to(parameter.device)
        self._first_step = self.epoch_loop.global_step
        super().run()

    @override
    def _load_combined_loader_states(self) -> None:
        super()._load_combined_loader_states()
        if self._steps is not None:
            self._at_iterator = self._capture()  # Lightning makes the first epoch's iterator right after this

    @override
    def on_advance_start(self) -> None:
        if self._carried is not None and not self.inside_epoch:
            # go on exactly where the last segment ended, whatever hooks and loaders have drawn since
            self._restore("random")
            self._resuming_from_checkpoint = False  # so that the epoch makes its own iterator, as a later epoch does
            self._carried = None
        super().on_advance_start()
        if self._steps is not None and self.trainer.current_epoch > 0:
            self._at_iterator = self._capture()  # every later epoch makes its own iterator, right after this

    @override
    def on_advance_end(self) -> None:
        super().on_advance_end()
        self._epochs_run += 1
        self._results_before = {}

    @override
    def on_run_end(self) -> None:
        over = bool(super().done)
        at_end = self._capture()
        if over:
            super().on_run_end()
        self._leave(at_end)
        if not over:
            raise SegmentEnd

    @property
    def inside_epoch(self) -> bool:
        """Whether this segment goes on inside an epoch."""
        return self._carried is not None and bool(self._carried["at_iterator"])

    def before_first_batch(self) -> None:
        """Remember from which state on the epoch's batches were drawn."""
        if self._steps is not None:
            self._at_first_batch = self._capture()

    def after_batch(self) -> None:
        """Go on with the epoch's means, and end the segment here, inside the epoch, if its steps are used up."""
        if self._results_before:
            merge_results(self.epoch_loop, self._results_before)
        if self.segment_done and self._epochs is None and not self.epoch_loop.done:
            self._leave(self._capture(), inside_epoch=True)
            raise SegmentEnd

    def check_fetcher(self, data_fetcher: DataFetcher) -> None:
        """Refuse what cannot be continued inside an epoch."""
        if self._steps is not None and isinstance(data_fetcher, DataLoaderIterFetcher):
            raise ValueError(
                "`local_steps` may end a turn inside an epoch, but this `training_step` takes a `dataloader_iter` and "
                "reads ahead as it likes, so the next turn could not find the place. Take batches, or use "
                "`local_epochs`."
            )

    def fast_forward(self, data_fetcher: DataFetcher) -> None:
        """Bring the epoch's iterator to where the last segment left it."""
        assert self._carried is not None
        if not all(isinstance(loader, _Stateful) for loader in loaders(self)):  # Lightning has restored those
            self._at_iterator = dict(self._carried["at_iterator"])
            self._at_first_batch = dict(self._carried["at_first_batch"])
            self._restore("at_iterator")
            iter(data_fetcher)
            self._restore("at_first_batch")  # hooks may have drawn between these two
            batches = self.epoch_loop.batch_progress.current.ready
            for _ in range(batches):
                next(data_fetcher)
            data_fetcher.fetched -= batches  # Lightning adds them in `on_run_start`
        self._restore("random")
        self._results_before = dict(self._carried["results"])
        self._carried = None

    @property
    def _device(self) -> Any:
        return self.trainer.strategy.root_device

    def _capture(self) -> dict[str, Any]:
        return random_state.capture(random_state.generators_of(loaders(self)), self._device)

    def _restore(self, name: str) -> None:
        assert self._carried is not None
        random_state.restore(self._carried[name], random_state.generators_of(loaders(self)), self._device)

    def _leave(self, at_end: dict[str, Any], *, inside_epoch: bool = False) -> None:
        module = self.trainer.lightning_module
        gradients: dict[str, Tensor] = {}
        if not module.automatic_optimization:  # one may accumulate by hand across batches
            gradients = {name: p.grad.detach() for name, p in module.named_parameters() if p.grad is not None}
        self._save(
            {
                "random": at_end,
                "at_iterator": self._at_iterator if inside_epoch else {},
                "at_first_batch": self._at_first_batch if inside_epoch else {},
                "metrics": metrics_to_carry(self.trainer),
                "metric_states": metric_states(module),
                "results": {**self._results_before, **results_to_carry(self.epoch_loop)} if inside_epoch else {},
                "accumulate_grad_batches": self.trainer.accumulate_grad_batches,
                "gradients": gradients,
                "stopped": bool(self.trainer.should_stop and self._can_stop_early),
            }
        )


class SegmentEpochLoop(TrainingEpochLoop):
    """Lightning's epoch loop, able to end and to go on after any batch."""

    @override
    def reset(self) -> None:
        if self._segment.inside_epoch:
            # the last segment ended after a whole batch with all its bookkeeping, so nothing is to be caught up with
            self.batch_progress.reset_on_restart()
            self.scheduler_progress.reset_on_restart()
            self.automatic_optimization.optim_progress.reset_on_restart()
        else:
            super().reset()

    @override
    def on_run_start(self, data_fetcher: DataFetcher) -> None:
        self._segment.check_fetcher(data_fetcher)
        if self._segment.inside_epoch:
            self._segment.fast_forward(data_fetcher)
            super().on_run_start(data_fetcher)
            not_restarting(self._segment)
        else:
            super().on_run_start(data_fetcher)
            self._segment.before_first_batch()

    @override
    def on_advance_end(self, data_fetcher: DataFetcher) -> None:
        super().on_advance_end(data_fetcher)
        self._segment.after_batch()

    @property
    def _segment(self) -> SegmentLoop:
        loop = self.trainer.fit_loop
        assert isinstance(loop, SegmentLoop)
        return loop
