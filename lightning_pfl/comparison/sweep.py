"""All runs of a comparison that are not finished, one after another, with the time that is left.

Start at `sweep`. Several processes may share one folder: a run belongs to whoever has locked it, and finished ones are
passed over.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_pfl.comparison.plan import Comparison, slug
from lightning_pfl.comparison.record import Record, record_path
from lightning_pfl.comparison.scores import last_scores
from lightning_pfl.comparison.training import Bench, run_one
from lightning_pfl.demo.run import quiet

__all__ = ["open_runs", "sweep"]

log = logging.getLogger(__name__)


def open_runs(comparison: Comparison, folder: Path, wanted: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Those that are not finished.

    Raises:
        ValueError: a finished run of other settings; the message says which.
    """
    found = []
    for name, seed in wanted:
        path = record_path(folder, name, seed)
        if not path.exists():
            found.append((name, seed))
        elif (key := Record.read(path.read_text("utf8")).key) != comparison.key(name):
            raise ValueError(
                f"{path} is a run of other settings (its key is {key}, that of {name!r} is now "
                f"{comparison.key(name)}). Take another --output, or delete it."
            )
    return found


def sweep(
    comparison: Comparison,
    folder: Path,
    wanted: Sequence[tuple[str, int]],
    *,
    bench: Callable[[], Bench],
    console: Console,
) -> int:
    """Do all runs that are not finished.

    Args:
        comparison: what is compared.
        folder: for records and checkpoints.
        wanted: method and seed of each.
        bench: makes the bench; not called if there is nothing to do.
        console: for progress.

    Returns:
        How many were run.
    """
    todo = open_runs(comparison, folder, wanted)
    console.print(f"{len(wanted) - len(todo)} of {len(wanted)} runs are finished")
    if not todo:
        return 0
    rounds, done = comparison.protocol.num_rounds, 0
    with quiet():
        where = bench()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console) as bar:
            whole = bar.add_task("rounds of all runs", total=len(todo) * rounds)
            for place, (name, seed) in enumerate(todo):
                path = record_path(folder, name, seed)
                path.parent.mkdir(parents=True, exist_ok=True)
                before = place * rounds

                def tell(round: int, before: int = before) -> None:
                    bar.update(whole, completed=before + round)

                bar.update(whole, description=f"{name}, seed {seed}", completed=before)
                try:
                    with FileLock(path.with_suffix(".lock"), timeout=0):
                        if path.exists():  # another process was faster
                            continue
                        start = time.process_time()
                        record = run_one(where, name, seed, folder / "unfinished" / slug(name) / str(seed), tell=tell)
                        record.write(path)
                        done += 1
                        bar.console.print(_line(record, time.process_time() - start))
                except Timeout:
                    log.info("%s, seed %d, is being run by another process.", name, seed)
            bar.update(whole, completed=len(todo) * rounds, description="done")
    return done


def _line(record: Record, seconds: float) -> str:
    own, others = last_scores(record)
    split = ", ".join(f"{name} {value:.0f} s" for name, value in record.seconds.items())
    asked = f"Self {100 * own:.1f} %" + ("" if math.isnan(others) else f", Others {100 * others:.1f} %")
    return f"{record.method}, seed {record.seed}: {asked}; {seconds:.0f} s of processor time ({split})"
