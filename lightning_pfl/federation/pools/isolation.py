"""What a process shares between turns, and how a turn neither feels nor changes it.

Start at `ProcessSettings`: captured once where the run was started, entered around every turn, in this process or in
another. Inside, random generators, threads, dtypes and autograd modes are what the job and the user's settings say;
afterwards all of it is as it was before. That is why pools give equal results. `Surroundings` are what is put back.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only

__all__ = ["ProcessSettings", "Surroundings"]

# what Lightning's seed_everything leaves for data loader workers, and what makes cuBLAS deterministic
_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUBLAS_WORKSPACE_CONFIG")
_SIGNALS = tuple(int(number) for number in signal.valid_signals())  # as enumeration members they are slow to make


@dataclass(frozen=True)
class ProcessSettings:
    """What the user set for the whole process, and what a turn elsewhere must therefore find.

    Attributes:
        default_dtype: of new tensors.
        deterministic: whether torch refuses algorithms that are not deterministic.
        warn_only: whether it only warns.
        matmul_precision: of float32 products on the GPU.
        cudnn: cuDNN's ``benchmark`` and ``deterministic``.
        variables: the environment variables that decide about randomness.

    Example:
        >>> settings = ProcessSettings.capture()
        >>> torch.manual_seed(7).initial_seed()
        7
        >>> with settings.turn(seed=3, num_threads=1):
        ...     _ = torch.rand(5)
        >>> torch.initial_seed()  # nothing happened to the caller's stream
        7
    """

    default_dtype: torch.dtype
    deterministic: bool
    warn_only: bool
    matmul_precision: str
    cudnn: tuple[bool, bool]
    variables: Mapping[str, str | None]

    @staticmethod
    def capture() -> ProcessSettings:
        """Read the settings of this process."""
        return ProcessSettings(
            default_dtype=torch.get_default_dtype(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            matmul_precision=torch.get_float32_matmul_precision(),
            cudnn=(torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
            variables={name: os.environ.get(name) for name in _VARIABLES},
        )

    def apply(self) -> None:
        """Set them in this process."""
        torch.set_default_dtype(self.default_dtype)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = self.cudnn
        for name, value in self.variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    @contextmanager
    def turn(self, *, seed: int, num_threads: int) -> Iterator[None]:
        """Run one turn under these settings and put back whatever it finds or leaves different.

        Args:
            seed: from which all random generators start.
            num_threads: torch threads.
        """
        with Surroundings.kept():
            self.apply()
            torch.set_num_threads(num_threads)
            vars(rank_zero_only)["rank"] = 0
            _seed(seed)
            # the caller may be inside a validation step or under autocast; a client's own Trainer decides for itself
            with torch.inference_mode(False), torch.enable_grad(), _no_autocast():
                yield


@dataclass(frozen=True)
class Surroundings:
    """All that turns in one process would otherwise share, as it is at a moment.

    Attributes:
        settings: see there.
        generators: states of the random generators.
        num_threads: torch threads.
        handlers: of signals; none outside the main thread, which alone may set them.
        rank: Lightning's, of the process; None where nobody has set it.
        folder: the working directory.
    """

    settings: ProcessSettings
    generators: Mapping[str, Any]
    num_threads: int
    handlers: Mapping[int, Any]
    rank: int | None
    folder: str

    @staticmethod
    def capture() -> Surroundings:
        """Read them."""
        return Surroundings(
            settings=ProcessSettings.capture(),
            generators=_generators(),
            num_threads=torch.get_num_threads(),
            handlers=_signal_handlers(),
            rank=vars(rank_zero_only).get("rank"),
            folder=os.getcwd(),
        )

    def restore(self) -> None:
        """Make everything as it was; handlers only in the main thread."""
        self.settings.apply()
        _restore(self.generators)
        if torch.get_num_threads() != self.num_threads:
            torch.set_num_threads(self.num_threads)
        for number, handler in self.handlers.items() if _in_main_thread() else ():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        if self.rank is None:
            vars(rank_zero_only).pop("rank", None)
        else:
            vars(rank_zero_only)["rank"] = self.rank
        if os.getcwd() != self.folder:
            os.chdir(self.folder)

    @staticmethod
    @contextmanager
    def kept() -> Iterator[None]:
        """Restore, however the block ends, what was before it."""
        before = Surroundings.capture()
        try:
            yield
        finally:
            before.restore()


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # that would take down a stack trace for every kind of device that might yet come, and keep some of them
        torch.default_generator.manual_seed(seed)


def _generators() -> dict[str, Any]:
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _restore(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])


def _signal_handlers() -> dict[int, Any]:
    """Python's handlers; only the main thread may set them, and those set by C code cannot be put back."""
    if not _in_main_thread():
        return {}
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    return {number: handler for number, handler in handlers.items() if handler is not None}


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _no_autocast() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
