"""States of frozen layers on disk, so that they are computed once per machine and not once per run.

Start at `StateCache`. A file's name is a digest of everything that decides its content: the weights of the layers below
and of the projector, the pictures' features, the tokens, the answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import final

from filelock import FileLock

from lightning_pfl.benchmark.batches import TaskDataset
from lightning_pfl.benchmark.packages import cache_dir
from lightning_pfl.benchmark.states import LowerLayers, StateDataset

__all__ = ["StateCache"]

_RECIPE = "states-1"  # changes with what is in a file


@final
class StateCache:
    """Gives examples as kept layers see them, from disk where they are and computed where they are not.

    Args:
        lower: the layers below.
        folder: where files lie; `<cache>/states` by default.
    """

    def __init__(self, lower: LowerLayers, *, folder: Path | None = None) -> None:
        self._lower = lower
        self._folder = folder or cache_dir() / "states"
        self._identity = lower.digest()

    def get(self, examples: TaskDataset, *, report: Callable[[int, int], None] | None = None) -> StateDataset:
        """The states of some examples.

        Args:
            examples: tokenised for the layers' model.
            report: called with (examples done, examples) while some are computed.
        """
        name = hashlib.sha256(f"{_RECIPE}/{self._identity}/{examples.digest()}".encode()).hexdigest()[:32]
        path = self._folder / name[:2] / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with FileLock(path.with_suffix(".lock")):
                if not path.exists():
                    StateDataset(examples, self._lower, report=report).save(path)
        return StateDataset.load(path)
