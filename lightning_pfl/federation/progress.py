"""How far a round is, on the progress bar that the user's Trainer has anyway.

One step of the driver's loop is a whole round, and Lightning moves its bars between steps only.
"""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.trainer.states import RunningStage

__all__ = ["show_clients"]

_BARS = {
    RunningStage.TRAINING: "train_progress_bar",
    RunningStage.VALIDATING: "val_progress_bar",
    RunningStage.TESTING: "test_progress_bar",
    RunningStage.PREDICTING: "predict_progress_bar",
}
_WORD = "clients"


def show_clients(trainer: L.Trainer, done: int, wanted: int) -> None:
    """Write ``clients 3/8`` on the bar of the stage that runs, until Lightning writes there itself.

    Nothing is shown without a bar, or on one that is neither of Lightning's two.

    Args:
        trainer: the driver's, inside a round or an evaluation.
        done: how many clients have delivered.
        wanted: how many are waited for.
    """
    bar, stage = trainer.progress_bar_callback, trainer.state.stage
    if not isinstance(bar, (TQDMProgressBar, RichProgressBar)) or not bar.is_enabled or stage not in _BARS:
        return
    told = f"{_WORD} {done}/{wanted}"
    if isinstance(bar, TQDMProgressBar):
        getattr(bar, _BARS[stage]).set_postfix_str(told)
    elif bar.progress is not None:
        for task in bar.progress.tasks:
            if task.id == getattr(bar, f"{_BARS[stage]}_id"):
                before = task.description.partition(f", {_WORD}")[0].rstrip()
                bar.progress.update(task.id, description=f"{before}, {told}", visible=True)
                bar.refresh(hard=True)
