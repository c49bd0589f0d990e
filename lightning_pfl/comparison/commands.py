"""`lightning-pfl benchmark run`, `tune`, `report` and `collect`.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from lightning_pfl.comparison.plan import Comparison
    from lightning_pfl.comparison.training import Bench

__all__ = ["COMMANDS", "collect", "report", "run", "tune"]


def run(
    config: Path,
    *,
    output: Path | None = None,
    seeds: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    accelerator: str = "cpu",
    estimate: bool = False,
) -> None:
    """Run every method and seed of a comparison that is not finished; stop it at any time and call it again.

    Args:
        config: YAML file of the comparison.
        output: folder for results; by default one beside the file, named like it.
        seeds: only these.
        methods: only these, by their names in the file.
        accelerator: of clients: cpu, gpu or auto.
        estimate: only say what it would cost.
    """
    from lightning_pfl.comparison.cost import estimated, print_estimate
    from lightning_pfl.comparison.sweep import open_runs, sweep

    console = Console()
    with _errors():
        comparison, folder = _read(config, output)
        wanted = _wanted(comparison, seeds, methods)
        todo = open_runs(comparison, folder, wanted)
        bench = _Once(comparison, folder, console, accelerator)
        if todo:
            print_estimate(estimated(bench(), [name for name, _ in todo]), todo, console)
        if not estimate:
            sweep(comparison, folder, wanted, bench=bench, console=console)
            console.print(f"results are in {folder}; lightning-pfl benchmark report {folder}")


def tune(
    config: Path, *, output: Path | None = None, methods: Sequence[str] | None = None, accelerator: str = "cpu"
) -> None:
    """Choose every method's hyper-parameters with the same budget on the validation side, for the runs to read.

    Args:
        config: YAML file of the comparison, which names in ``tuned`` the file that is written.
        output: folder for the runs that choices are made by; by default beside the results.
        methods: only these, by their names in the file; what was chosen for others stays.
        accelerator: of clients: cpu, gpu or auto.
    """
    from lightning_pfl.comparison.plan import tuned_path
    from lightning_pfl.comparison.tuning import tune as choose
    from lightning_pfl.comparison.tuning import write_chosen

    console = Console()
    with _errors():
        path = tuned_path(config)
        comparison, folder = _read(config, output)
        folder = folder if output else folder / "tuning"
        for name in methods or ():
            comparison.method(name)
        wanted = {name: comparison.methods[name] for name in methods or comparison.methods}
        comparison = replace(comparison, methods=wanted, tuned={})  # what was chosen before decides nothing

        def bench(of_trials: Comparison) -> Bench:
            return _Once(of_trials, folder, console, accelerator)()

        write_chosen(choose(comparison, folder, bench=bench, console=console), path)
        console.print(f"wrote {path}")


def report(place: Path, *, output: Path | None = None) -> None:
    """Write a page and Markdown tables about what was run.

    Args:
        place: folder of results, or a file with one record per line.
        output: folder to write to; by default the folder of results, or the one of the file.
    """
    from lightning_pfl.comparison.record import read_records
    from lightning_pfl.comparison.report.page import write_report

    with _errors():
        target = output or (place if place.is_dir() else place.parent)
        for path in write_report(read_records(place), target):
            Console().print(f"wrote {path}")


def collect(place: Path, output: Path) -> None:
    """Write all records of a folder to one file, one per line, to be kept with the file of the comparison.

    Args:
        place: folder of results.
        output: file to write; gzipped if its name ends in .gz.
    """
    import gzip

    from lightning_pfl.comparison.record import read_records

    with _errors():
        records = read_records(place)
        partial = output.with_name(f".{output.name}.part")
        data = "".join(f"{record.line()}\n" for record in records).encode()
        if output.suffix == ".gz":
            data = gzip.compress(data, mtime=0)  # the same bytes each time
        partial.write_bytes(data)
        partial.replace(output)
        Console().print(f"wrote {len(records)} runs to {output}")


class _Once:
    """Makes the bench when it is first asked for."""

    def __init__(self, comparison: Comparison, folder: Path, console: Console, accelerator: str) -> None:
        self._made: Bench | None = None
        self._comparison, self._folder = comparison, folder
        self._console, self._accelerator = console, accelerator

    def __call__(self) -> Bench:
        if self._made is None:
            from lightning_pfl.comparison.preparation import prepare
            from lightning_pfl.comparison.training import Bench
            from lightning_pfl.comparison.world import world_of
            from lightning_pfl.demo.progress import ConsoleProgress
            from lightning_pfl.demo.run import quiet

            progress = ConsoleProgress(self._console)
            with quiet():
                world = world_of(self._comparison.protocol, self._folder)
                prepared = prepare(self._comparison, world, progress)
            progress.stage("prepared")
            self._made = Bench.of(self._comparison, prepared, accelerator=self._accelerator)
        return self._made


def _read(config: Path, output: Path | None) -> tuple[Comparison, Path]:
    from lightning_pfl.comparison.plan import read_comparison

    return read_comparison(config), output or config.with_suffix("")


def _wanted(
    comparison: Comparison, seeds: Sequence[int] | None, methods: Sequence[str] | None
) -> list[tuple[str, int]]:
    for name in methods or ():
        comparison.method(name)
    chosen = [
        (name, seed)
        for name, seed in comparison.runs()
        if (seeds is None or seed in seeds) and (methods is None or name in methods)
    ]
    if not chosen:
        raise ValueError(f"Nothing is chosen: the seeds are {list(comparison.seeds)}, not {list(seeds or ())}.")
    return chosen


@contextmanager
def _errors() -> Iterator[None]:
    """What a user can mend is said in one line, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"lightning-pfl benchmark: {error}")


_CONFIG = ("config", {"type": Path, "help": "YAML file of the comparison"})
_OUTPUT = ("--output", {"type": Path, "default": None, "help": "folder for results; beside the file by default"})
_PLACE = ("place", {"type": Path, "help": "folder of results, or a file with one record per line"})
_METHODS = ("--methods", {"nargs": "+", "default": None, "help": "only these, by their names in the file"})
_ACCELERATOR = ("--accelerator", {"default": "cpu", "help": "of clients: cpu, gpu or auto"})

COMMANDS: Mapping[Any, Sequence[tuple[str, Mapping[str, Any]]]] = {
    run: (
        _CONFIG,
        _OUTPUT,
        ("--seeds", {"nargs": "+", "type": int, "default": None, "help": "only these"}),
        _METHODS,
        _ACCELERATOR,
        ("--estimate", {"action": "store_true", "help": "only say what it would cost"}),
    ),
    tune: (_CONFIG, _OUTPUT, _METHODS, _ACCELERATOR),
    report: (_PLACE, ("--output", {"type": Path, "default": None, "help": "folder to write to"})),
    collect: (_PLACE, ("output", {"type": Path, "help": "file to write"})),
}
"""What `lightning-pfl benchmark` offers beside the suite's commands, and the arguments of each."""
