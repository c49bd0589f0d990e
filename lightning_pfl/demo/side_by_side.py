"""Work on several models at once, one thread each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["Report", "side_by_side"]

T = TypeVar("T")
Report = Callable[[int, int], None]
"""Called with how many are done, and of how many."""


def side_by_side(work: Mapping[str, Callable[[Report], T]], report: Report) -> dict[str, T]:
    """Run functions in threads that share the cores evenly.

    With prompts of some tokens, two models on one core each are twice as fast as one after the other on two cores.

    Args:
        work: by key, a function that takes a function to call with (done, total) of its own.
        report: called with the sums of these, by one thread at a time.

    Returns:
        What each gave. If one raises, the others are waited for and its error is raised.

    Example:
        >>> counts = []
        >>> work = {"a": lambda report: report(1, 2), "b": lambda report: report(2, 2)}
        >>> side_by_side(work, lambda *counted: counts.append(counted))
        {'a': None, 'b': None}
        >>> max(counts)
        (3, 4)
    """
    threads = torch.get_num_threads()
    counts: dict[str, tuple[int, int]] = {}
    lock = threading.Lock()

    def run(key: str) -> T:
        torch.set_num_threads(max(1, threads // len(work)))

        def counted(done: int, total: int) -> None:
            with lock:
                counts[key] = done, total
                report(sum(done for done, _ in counts.values()), sum(total for _, total in counts.values()))

        return work[key](counted)

    try:
        with ThreadPoolExecutor(max_workers=max(1, len(work))) as pool:
            running = {key: pool.submit(run, key) for key in work}
            return {key: future.result() for key, future in running.items()}
    finally:
        torch.set_num_threads(threads)
