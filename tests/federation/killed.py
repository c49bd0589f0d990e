"""A program for tests: federated runs whose process dies at many instants, and that are resumed.

``python -m tests.federation.killed FOLDER INSTANT...`` forks a run per instant, lets it die there, resumes it in
another process, and prints one line of JSON per instant. An instant is a number of file operations of the run (opening,
syncing, renaming, removing), from 1; a negative one is a number of milliseconds; 0 does not die, and tells how many
there are.
"""

import hashlib
import json
import os
import signal
import stat
import sys
import traceback
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_pfl.callbacks.colora import CoLoRA
from lightning_pfl.federation import Client, ClientStore, FederatedStrategy, LocalPool
from tests.federation.tiny import Blocks, ClientsOwnData

ROUNDS = 3
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")


class Notes(L.Callback):
    """Which round each process of a run began with."""

    federated_scope = "server"

    def __init__(self, folder):
        self.folder = folder

    def on_train_start(self, trainer, pl_module):
        with open(self.folder / "begun", "a") as file:
            file.write(f"{trainer.current_epoch}\n")


class SavedIsNoted(ModelCheckpoint):
    """How many checkpoints were whole before the process died."""

    federated_scope = "server"

    def _save_last_checkpoint(self, trainer, monitor_candidates):
        super()._save_last_checkpoint(trainer, monitor_candidates)
        with open(f"{self.dirpath}/../saved", "a") as file:
            file.write(f"{trainer.current_epoch}\n")


def run(folder, **arguments):
    """Train to the end from the last checkpoint, if there is one; write what came of it."""
    strategy = FederatedStrategy([Client("a"), Client("b")], pool=LocalPool(), store=ClientStore(folder / "states"))
    checkpoints = folder / "checkpoints"
    callbacks = [
        CoLoRA(rank=2, alpha=4, num_blocks=1, target_modules=["fc"], train_also=["head"], dropout=0.2),
        SavedIsNoted(checkpoints, filename="{epoch}", save_top_k=1, save_last=True),
        Notes(folder),
    ]
    trainer = L.Trainer(
        max_epochs=ROUNDS,
        strategy=strategy,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **arguments,
    )
    module, last = Blocks(), checkpoints / "last.ckpt"
    trainer.fit(module, datamodule=ClientsOwnData(), ckpt_path="last" if last.exists() else None)
    states = [strategy.store.get(client_id) for client_id in "ab"]
    adapters = [tensor.numpy().tobytes() for tensor in module.state_dict().values()]
    (folder / "outcome").write_text(hashlib.sha256(b"".join([*states, *adapters])).hexdigest())


def dies_at(instant, folder):
    """Let this process die at its n-th file operation, in the middle of a write where that is what it does."""
    done = 0

    def reached():
        nonlocal done
        done += 1
        return done == instant

    def hook(event, arguments):
        if event in EVENTS and str(folder) in str(arguments[0]) and reached():
            os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync

    def half(handle):
        if reached():
            if stat.S_ISREG(os.fstat(handle).st_mode):  # and no folder
                os.ftruncate(handle, os.fstat(handle).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    sys.addaudithook(hook)
    os.fsync = half
    return lambda: done


def in_child(function):
    """Run in a process of its own; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_and_resumed(folder, instant):
    """One run."""
    folder.mkdir(parents=True)

    def first():
        if instant < 0:
            signal.setitimer(signal.ITIMER_REAL, -instant / 1000)  # whose signal ends the process at once
        else:
            count = dies_at(instant, folder)
        run(folder)
        if instant == 0:
            (folder / "count").write_text(str(count()))

    status = in_child(first)
    saved = _lines(folder / "saved")
    resumed = 0 if status == 0 else in_child(lambda: run(folder))
    outcome = folder / "outcome"
    return {
        "instant": instant,
        "status": status,
        "resumed": resumed,
        "saved": len(saved),
        "begun": _lines(folder / "begun"),
        "outcome": outcome.read_text() if outcome.exists() else None,
        "count": int((folder / "count").read_text()) if instant == 0 else None,
        "left": sorted(path.name for path in folder.rglob("*.ckpt")),
    }


def _lines(path):
    return [int(line) for line in path.read_text().split()] if path.exists() else []


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number in sys.argv[2:]:
        print(json.dumps(killed_and_resumed(Path(sys.argv[1]) / number, int(number))), flush=True)
