"""The side of a pool that runs in another process: it keeps snapshots, and runs one turn at a time.

Start at `Worker`. It knows no Ray: what it needs from afar it gets from functions that it is handed, so it can be
tested in one process. The run's tensor file is used where it lies if that is this machine; else one worker per
machine writes a copy, which goes away with the pool.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import shutil
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import lightning
import torch
from filelock import FileLock

from lightning_pfl.federation.jobs import Failure, JobResult
from lightning_pfl.federation.pickling import Pickled, dump, explain, load
from lightning_pfl.federation.pools.isolation import ProcessSettings
from lightning_pfl.federation.snapshot import Snapshot
from lightning_pfl.federation.temporary import hold, sweep
from lightning_pfl.federation.tensor_file import TensorFileRef
from lightning_pfl.federation.turn import run_job

__all__ = ["Outcome", "Worker", "WorkerSetup", "machine", "versions"]

_SNAPSHOTS_KEPT = 8


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker is told when it starts.

    Attributes:
        settings: of the process that started the run.
        folder: its working directory; used where it exists.
        machine: where it runs, from `machine`.
        run: names this run's copies of files apart from those of others.
        hide_gpus: whether the clients of this worker asked for no GPU, and therefore see none.
    """

    settings: ProcessSettings
    folder: str
    machine: str
    run: str
    hide_gpus: bool


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a worker answers.

    Attributes:
        result: a pickled `JobResult`, if a job was done.
        missing: a file that is not on this machine and must be sent first.
        versions: of what results depend on, from a worker that has got ready.
    """

    result: Pickled | None = None
    missing: TensorFileRef | None = None
    versions: Mapping[str, str] | None = None


@final
class Worker:
    """Runs turns that are sent to it as bytes.

    Args:
        setup: what to know of the process that started the run.
        fetch: gets a snapshot by its name.
    """

    def __init__(self, setup: WorkerSetup, fetch: Callable[[str], Snapshot]) -> None:
        self._setup = setup
        self._fetch = fetch
        self._snapshots: dict[str, tuple[Snapshot, Snapshot]] = {}  # by name, as sent and as used here
        self._copies: dict[str, str] = {}  # by the path where the file comes from
        self._held: list[FileLock | None] = []  # to the end of the process
        if setup.hide_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if setup.machine == machine():
            with contextlib.suppress(OSError):
                os.chdir(setup.folder)

    def warm_up(self, snapshot: str | None) -> Outcome:
        """Import what a first turn would wait for, and look for the tensor file of a snapshot."""
        importlib.import_module("torch._dynamo")  # the first optimizer step would; it takes a second
        if snapshot is None:
            return Outcome(versions=versions())
        found = self._snapshot(snapshot)
        if isinstance(found, TensorFileRef):
            return Outcome(missing=found)
        with contextlib.suppress(Exception), self._setup.settings.turn(seed=0, num_threads=1):
            found.load()  # imports the user's modules; what goes wrong here is reported with the first job
        return Outcome(versions=versions())

    def receive(self, file: TensorFileRef, pieces: Iterable[bytes | memoryview]) -> Outcome:
        """Write this machine's copy of a file, unless another worker of the run did so already.

        Args:
            file: as it is called where it comes from.
            pieces: its bytes, in order; read only when they are needed.
        """
        folder = Path(tempfile.gettempdir()) / f"lightning-pfl-{self._setup.run}-{file.digest[:16]}"
        sweep(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        self._held.append(hold(folder))
        path = folder / "tensors"
        with FileLock(folder / "writing"):
            if not _has(path, file.nbytes):
                unfinished = folder / "unfinished"
                with open(unfinished, "wb") as stream:
                    stream.writelines(pieces)
                os.replace(unfinished, path)
        self._copies[file.path] = str(path)
        return Outcome(versions=versions())

    def run(self, job: Pickled, snapshot: str, seed: int, num_threads: int) -> Outcome:
        """Run one turn; what goes wrong in it is part of the result.

        Args:
            job: a pickled `Job`.
            snapshot: which one it starts from.
            seed: of its client.
            num_threads: torch threads of its client.
        """
        found = self._snapshot(snapshot)
        if isinstance(found, TensorFileRef):
            return Outcome(missing=found)
        with self._setup.settings.turn(seed=seed, num_threads=num_threads):
            result = run_job(found, load(job))
        try:
            return Outcome(dump(result))
        except Exception:
            reason = explain(result.predictions, "predictions") or explain(result, "result") or traceback.format_exc()
            trace = f"What client `{result.client_id}` returned cannot be sent to the server: {reason}"
            return Outcome(dump(JobResult(result.client_id, failure=Failure(trace))))

    def forget(self) -> None:
        """Remove this machine's copies of files."""
        for path in self._copies.values():
            shutil.rmtree(Path(path).parent, ignore_errors=True)
        self._copies.clear()

    def _snapshot(self, name: str) -> Snapshot | TensorFileRef:
        """A snapshot whose tensor file lies on this machine; or the file that is not here."""
        sent, used = self._snapshots.pop(name) if name in self._snapshots else (self._fetch(name),) * 2
        if sent.file is not None and used.file is not None:
            if (path := self._path_here(sent.file)) is None:
                return sent.file
            if used.file.path != path:
                used = sent.at(path)
        self._snapshots[name] = sent, used  # the one used last stands last
        if len(self._snapshots) > _SNAPSHOTS_KEPT:
            del self._snapshots[next(iter(self._snapshots))]
        return used

    def _path_here(self, file: TensorFileRef) -> str | None:
        if self._setup.machine == machine() and _has(file.path, file.nbytes):
            return file.path
        copy = self._copies.get(file.path)
        return copy if copy is not None and _has(copy, file.nbytes) else None


def machine() -> str:
    """Name the machine (and its boot) that this process runs on.

    Example:
        >>> machine() == machine()
        True
    """
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}/{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    return f"{socket.gethostname()}/{platform.platform()}"


def versions() -> dict[str, str]:
    """The versions that results depend on, down to the bit.

    Example:
        >>> sorted(versions())
        ['lightning', 'python', 'torch']
    """
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": str(lightning.__version__),
    }


def _has(path: str | Path, nbytes: int) -> bool:
    try:
        return os.stat(path).st_size >= nbytes and os.access(path, os.R_OK)
    except OSError:
        return False
