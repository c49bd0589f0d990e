"""What a measured process says of itself: when it had imported everything, when rounds ended, what came of them.

Standard library only, as it runs in every environment.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.engine.tree import cpu_seconds

__all__ = ["Marks"]


class Marks:
    """Takes down points of the run, as seconds of the clock and CPU-seconds of the process tree so far.

    Args:
        path: where `write` puts them.
        rounds: how many the run has. What a later round costs is read at the end of the last one, while all processes
            that had a part in it still live: a worker of Ray takes its CPU-seconds with it when it ends.
    """

    def __init__(self, path: str | os.PathLike[str], *, rounds: int) -> None:
        self._path, self._expected = Path(path), rounds
        self._points: dict[str, tuple[float, float]] = {}
        self._rounds: list[float] = []

    def imported(self) -> None:
        """All modules are there; data and models are not."""
        self._take("imported")

    def started(self) -> None:
        """The system is told to begin."""
        self._take("started")

    def round(self) -> None:
        """A round has ended. The tree is read after the first and the last only: it takes as long as a tiny client."""
        self._rounds.append(time.time())
        if len(self._rounds) == 1:
            self._take("first")
        if len(self._rounds) == self._expected:
            self._take("last")

    def write(self, **results: Any) -> None:
        """All rounds have ended.

        Args:
            results: what else is worth a column.

        Raises:
            RuntimeError: there were fewer or more rounds than expected.
        """
        if len(self._rounds) != self._expected:
            raise RuntimeError(f"{len(self._rounds)} rounds have ended; {self._expected} were expected.")
        each = [after - before for before, after in zip(self._rounds, self._rounds[1:], strict=False)]
        self._path.write_text(json.dumps({"points": self._points, "rounds": each, "results": results}))

    def _take(self, name: str) -> None:
        self._points[name] = (time.time(), cpu_seconds(os.getpid()))
