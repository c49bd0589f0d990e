"""What a process and all its descendants use: CPU-seconds and proportional memory, read from /proc (Linux).

Memory is PSS: a page that several processes have mapped counts for each of them in equal parts, so that sums over a
tree mean something. CPU time is user plus system time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Watch", "cpu_seconds", "descendants", "pss_mib"]

_TICKS = os.sysconf("SC_CLK_TCK")


def descendants(root: int) -> list[int]:
    """A process and all that descend from it and live, the process first."""
    return list(_stats(root))


def cpu_seconds(root: int) -> float:
    """CPU time so far of a process, its descendants that live, and those whose end they have waited for.

    The kernel counts others' times in hundredths of a second; the caller's own is exact.
    """
    stats = _stats(root)
    ticks = sum(sum(stat.times) for stat in stats.values())
    if (own := stats.get(os.getpid())) is None:
        return ticks / _TICKS
    return (ticks - sum(own.times[:2])) / _TICKS + time.process_time()


def pss_mib(pid: int) -> float:
    """A process' proportional memory in MiB; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


class Watch(threading.Thread):
    """Reads a tree while it runs, as a context.

    A worker whose parent never waits for it (Ray's) takes its times with it when it ends, so each process' last reading
    is kept: what is lost is at most one interval per process.

    Args:
        root: the process.
        interval: seconds from one reading to the next.

    Attributes:
        cpu: CPU-seconds of all processes that were seen.
        peak_mib: the highest PSS of the tree that was seen.
        processes: the most that were seen at once.
    """

    def __init__(self, root: int, *, interval: float = 0.25) -> None:
        super().__init__(daemon=True)
        self.cpu, self.peak_mib, self.processes = 0.0, 0.0, 0
        self._root, self._interval = root, interval
        self._own: dict[tuple[int, int], int] = {}
        self._over = threading.Event()

    def run(self) -> None:
        count = 0
        while not self._over.wait(self._interval if count else 0):
            stats = _stats(self._root)
            self._own |= {(pid, stat.started): sum(stat.times[:2]) for pid, stat in stats.items()}
            self.processes = max(self.processes, len(stats))
            if count % 2 == 0:  # summing up a process' pages takes longer
                self.peak_mib = max(self.peak_mib, sum(map(pss_mib, stats)))
            count += 1
        self.cpu = sum(self._own.values()) / _TICKS

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.join()


class _Stat:
    """A line of /proc/<pid>/stat: who started it, when, and clock ticks as user, system, children's user and system."""

    def __init__(self, line: str) -> None:
        fields = line[line.rindex(")") + 2 :].split()
        self.parent, self.started = int(fields[1]), int(fields[19])
        self.times = [int(number) for number in fields[11:15]]


def _stats(root: int) -> dict[int, _Stat]:
    every = dict(_all_stats())
    children: dict[int, list[int]] = {}
    for pid, stat in every.items():
        children.setdefault(stat.parent, []).append(pid)
    found, waiting = {}, [root]
    while waiting:
        pid = waiting.pop(0)
        if pid in every:
            found[pid] = every[pid]
            waiting += children.get(pid, [])
    return found


def _all_stats() -> Iterator[tuple[int, _Stat]]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                yield int(entry), _Stat(Path(f"/proc/{entry}/stat").read_text())
            except (OSError, ProcessLookupError):  # it has ended meanwhile
                continue
