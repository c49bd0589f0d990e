"""How far a round is, on the progress bar that the user's Trainer has anyway.

Start at `Progress`. One step of the driver's loop is a whole round, and Lightning moves its bars between steps only; so
what happens inside a round is written beside them: clients, actors, bytes, and the time that is left.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import final

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.trainer.states import RunningStage, TrainerFn

from lightning_pfl.federation.forecast import duration
from lightning_pfl.federation.pools import ClientPool

__all__ = ["Progress", "amount"]

_TOLD = logging.getLogger("lightning.pytorch")  # Lightning shows its lines, which a package of ours could not

_BARS = {
    RunningStage.TRAINING: "train_progress_bar",
    RunningStage.VALIDATING: "val_progress_bar",
    RunningStage.TESTING: "test_progress_bar",
    RunningStage.PREDICTING: "predict_progress_bar",
}
_WORD = "clients"


@final
class Progress:
    """Writes ``clients 3/8, actors 2/3, 1.2 MB up, 3.4 MB down, 4 min left`` on the bar of the stage that runs.

    Nothing is written without a bar, or on one that is neither of Lightning's two. When the first round is over, the
    log says how long it took and how long the others will take.

    Args:
        trainer: the driver's.
        pool: where clients run.
        traffic: gives the bytes so far, up and down.
        clock: gives seconds.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        pool: ClientPool,
        traffic: Callable[[], tuple[int, int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trainer = trainer
        self._pool = pool
        self._traffic = traffic
        self._clock = clock
        self._epoch: int | None = None
        self._begun = 0.0
        self._rounds, self._seconds = 0, 0.0  # that are over

    def __call__(self, done: int, wanted: int) -> None:
        """Say how many clients have delivered in this stage, of how many that are waited for."""
        self._note_round()
        up, down = self._traffic()
        places = self._pool.at_work()
        left = self.seconds_left(done, wanted)
        parts = [
            f"{_WORD} {done}/{wanted}",
            "" if places is None else f"actors {places[0]}/{places[1]}",
            f"{amount(up)} up",
            f"{amount(down)} down",
            "" if left is None else f"{duration(left)} left",
        ]
        _write(self._trainer, ", ".join(part for part in parts if part))

    def seconds_left(self, done: int, wanted: int) -> float | None:
        """Until the last round is over, from how long rounds took so far; in the first from how many have delivered.

        None where nothing can be said: before anybody has delivered, without a last round, outside ``trainer.fit``.
        """
        last = self._trainer.max_epochs
        if self._epoch is None or last is None or last < 0 or self._trainer.state.fn is not TrainerFn.FITTING:
            return None
        elapsed = self._clock() - self._begun
        if self._rounds:
            usual = self._seconds / self._rounds
        elif done and self._trainer.state.stage is RunningStage.TRAINING:
            usual = elapsed * wanted / done
        else:
            return None
        return max(0.0, usual - elapsed) + usual * max(0, last - self._epoch - 1)

    def _note_round(self) -> None:
        if self._trainer.state.stage is not RunningStage.TRAINING or self._trainer.current_epoch == self._epoch:
            return
        now = self._clock()
        if self._epoch is not None:
            self._rounds += 1
            self._seconds += now - self._begun
        self._epoch, self._begun = self._trainer.current_epoch, now
        left = self.seconds_left(0, 1)
        if self._rounds == 1 and left is not None:
            took, more = duration(self._seconds), (self._trainer.max_epochs or 0) - self._epoch
            _TOLD.info(f"The first round took {took}; {more} more will take about {duration(left)}.")


def amount(nbytes: int) -> str:
    """A number of bytes in words.

    Example:
        >>> [amount(value) for value in (0, 999, 15_253, 2_500_000, 3_000_000_000)]
        ['0 B', '999 B', '15.3 kB', '2.5 MB', '3.0 GB']
    """
    size = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _write(trainer: L.Trainer, told: str) -> None:
    """Write on the bar of the stage that runs, until Lightning writes there itself."""
    bar, stage = trainer.progress_bar_callback, trainer.state.stage
    if not isinstance(bar, (TQDMProgressBar, RichProgressBar)) or not bar.is_enabled or stage not in _BARS:
        return
    if isinstance(bar, TQDMProgressBar):
        getattr(bar, _BARS[stage]).set_postfix_str(told)
    elif bar.progress is not None:
        for task in bar.progress.tasks:
            if task.id == getattr(bar, f"{_BARS[stage]}_id"):
                before = task.description.partition(f", {_WORD}")[0].rstrip()
                bar.progress.update(task.id, description=f"{before}, {told}", visible=True)
                bar.refresh(hard=True)
