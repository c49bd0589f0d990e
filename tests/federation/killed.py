"""A program for tests: federated runs whose process dies at many instants, and that are resumed.

``python -m tests.federation.killed FOLDER INSTANT...`` forks a run per instant, lets it die there, resumes it in
another process at once, and prints one line of JSON per instant. An instant is a number of file operations of the run
(opening, syncing, renaming, removing), from 1; a negative one is a number of milliseconds; 0 does not die, and tells
how many there are; at ``turn`` a client is in the middle of its turn in the second round. With ``--places cluster``
clients run in one actor of a Ray cluster that lives on and has room for no other, with ``--places ray`` in the Ray that
each run starts for itself, and the line says which processes have outlived their driver. The exit code says whether all
runs ended as the first one.
"""

import argparse
import ctypes
import hashlib
import json
import os
import signal
import stat
import sys
import time
import traceback
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_pfl.callbacks.colora import CoLoRA
from lightning_pfl.federation import Client, ClientStore, FederatedStrategy, LocalPool, RayPool, round_log
from tests.federation.tiny import Blocks, ClientsOwnData

ROUNDS = 3
ROOM = 30_000  # bytes of states in memory: for one of two, so that the other is a file before it counts
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")
MARK = "FEDERATED_TEST"  # in the environment of all processes of a Ray that a driver started
PATIENCE = 120.0  # seconds for the processes of a dead driver to end
RAYS_PATIENCE = ("RAY_gcs_rpc_server_reconnect_timeout_s", "5")  # of its agents with a dead cluster; 60 otherwise


class Deadly(Blocks):
    """Whose client `b` kills the driver in its second turn if a note says so, and then hangs."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.driver = os.getpid()

    def on_train_start(self):
        if os.getpid() != self.driver:
            with open(self.folder / "actors", "a") as file:
                file.write(f"{os.getpid()}\n")

    def training_step(self, batch, batch_idx):
        strategy, note = self.trainer.strategy, self.folder / "victim"
        if strategy.client_id == "b" and strategy.round == 1 and batch_idx == 1 and note.exists():
            note.unlink()
            os.kill(self.driver, signal.SIGKILL)
            time.sleep(600)
        return super().training_step(batch, batch_idx)


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


def run(folder, pool):
    """Train to the end from the last checkpoint, if there is one; write what came of it."""
    round_log._FULL = 1  # every round is a block, so that one may die while it is written
    store = ClientStore(folder / "states", max_memory=ROOM)
    strategy = FederatedStrategy([Client("a"), Client("b")], pool=pool, store=store)
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
    )
    module, last = Deadly(folder), checkpoints / "last.ckpt"
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


def killed_and_resumed(folder, instant, pool):
    """One run; `pool` makes one."""
    folder.mkdir(parents=True)
    mark = uuid.uuid4().hex

    def first():
        os.environ |= dict([(MARK, mark), RAYS_PATIENCE])
        if instant == "turn":
            (folder / "victim").touch()
        elif instant < 0:
            signal.setitimer(signal.ITIMER_REAL, -instant / 1000)  # whose signal ends the process at once
        else:
            count = dies_at(instant, folder)
        run(folder, pool())
        if instant == 0:
            (folder / "count").write_text(str(count()))

    status = in_child(first)
    saved, actors = _lines(folder / "saved"), set(_lines(folder / "actors"))
    resumed = 0 if status == 0 else in_child(lambda: run(folder, pool()))
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
        "actors": len(actors),
        "orphans": orphans(actors, mark),
    }


def orphans(actors, mark):
    """Processes of a dead driver that do not end by themselves."""

    def living():
        bury()
        return {pid for pid in actors if alive(pid)} | marked(mark)

    return outliving(living)


def outliving(living):
    """Which processes of those that `living` finds are still there after some patience: a kill takes effect later."""
    deadline = time.monotonic() + PATIENCE
    while (found := sorted(living())) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def become_init():
    """Be the parent of the processes that a dead driver leaves, as Ray's live on until their raylet is buried.

    They ask whether a process of its number exists, and a dead one does for as long as nobody waits for it. The first
    process of a machine waits for all, that of a container may not.
    """
    if sys.platform == "linux":
        PR_SET_CHILD_SUBREAPER = 36
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def bury():
    """Wait for the dead among our children."""
    with suppress(ChildProcessError):  # as there is none
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def alive(pid):
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def marked(mark):
    """Processes that were started with a mark in their environment."""
    found = set()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environ.read_bytes() and alive(int(environ.parent.name)):
                found.add(int(environ.parent.name))
        except OSError:
            continue
    return found


@contextmanager
def cluster():
    """The address of a Ray cluster with one CPU, which lives in a child, as who forks must not be part of one."""
    address, tell = os.pipe()
    stay, leave = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(leave)
        status = 1
        try:
            from ray.cluster_utils import Cluster

            started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
            os.write(tell, started.address.encode())
            os.close(tell)
            os.read(stay, 1)  # until the other end is closed
            started.shutdown()
            status = 0
        finally:
            os._exit(status)
    os.close(tell)
    os.close(stay)
    try:
        yield os.read(address, 1000).decode()
    finally:
        os.close(leave)
        os.waitpid(child, 0)


def _lines(path):
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("instants", nargs="+", help="a number, or 'turn'")
    parser.add_argument("--places", choices=["local", "cluster", "ray"], default="local")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    become_init()

    def runs(pool):
        done = []
        for name in arguments.instants:
            instant = name if name == "turn" else int(name)
            done.append(killed_and_resumed(arguments.folder / name, instant, pool))
            print(json.dumps(done[-1]), flush=True)
        first = done[0]["outcome"]
        return [run["instant"] for run in done if run["resumed"] or run["orphans"] or run["outcome"] != first]

    if arguments.places == "local":
        wrong = runs(LocalPool)
    elif arguments.places == "ray":
        wrong = runs(lambda: RayPool(address="local", num_actors=1, init={"num_cpus": 1}))
    else:
        with cluster() as address:
            wrong = runs(lambda: RayPool(address=address, num_actors=1))
    if wrong:
        sys.exit(f"Runs that died at {wrong} did not end as the first one did.")


if __name__ == "__main__":
    from tests.federation import killed as importable  # so that actors find its classes

    importable.main()
