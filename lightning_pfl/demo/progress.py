"""What a person sees while the demo prepares: a line per stage with the time it began, a bar where something counts."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["ConsoleProgress", "DemoProgress"]


class DemoProgress(ABC):
    """Told of what is being done."""

    @abstractmethod
    def stage(self, what: str) -> None:
        """Something else begins."""

    @abstractmethod
    def count(self, done: int, total: int) -> None:
        """How far the stage is; a stage may count several times from the beginning."""

    @abstractmethod
    def close(self) -> None:
        """Nothing more is counted."""


@final
class ConsoleProgress(DemoProgress):
    """Prints to a console.

    Args:
        console: of the command line.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start = time.monotonic()
        self._bar: tuple[Progress, TaskID] | None = None

    def stage(self, what: str) -> None:
        """One line, with the seconds since the beginning."""
        self.close()
        self._console.print(f"[dim]{time.monotonic() - self._start:6.1f} s[/dim]  {what}")

    def count(self, done: int, total: int) -> None:
        """A bar with the time that is left; it goes when it is full."""
        if done >= total:
            self.close()
            return
        if self._bar is None:
            columns = (TextColumn("         "), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            bar = Progress(*columns, console=self._console, transient=True)
            self._bar = bar, bar.add_task("", total=total)
            bar.start()
        bar, task = self._bar
        bar.update(task, completed=done, total=total)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None
