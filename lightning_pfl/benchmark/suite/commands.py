"""The commands of `lightning-pfl benchmark`: list, build, verify and show the suite.

Start at `COMMANDS`. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from lightning_pfl.benchmark.suite.library import Library
    from lightning_pfl.benchmark.suite.recipes import TaskSpec
    from lightning_pfl.benchmark.tasks import Task


def tasks(names: Sequence[str] = ()) -> None:
    """List the suite's tasks: what each asks, whose place it takes, which client has it when, what it is related to.

    Args:
        names: tasks ("A1") or groups ("A", "B", "K", "U"); all by default.
    """
    from lightning_pfl.benchmark.suite.graph import relatives

    table = Table("task", "client", "time", "asks", "related to", "in the place of", box=None)
    for spec in _chosen(names):
        place = ("-", "-") if spec.client is None else (str(spec.client), str(spec.time))
        asks = f"{spec.asks} (open)" if spec.open_ended else spec.asks
        table.add_row(spec.name, *place, asks, " ".join(relatives(spec.id)), spec.analogue)
    Console().print(table)


def build(root: Path, names: Sequence[str] = (), *, smoke: bool = False, pixels: int = 128, workers: int = 1) -> None:
    """Write the suite as files in the published form; stop it at any time and call it again.

    Args:
        root: folder to write into.
        names: tasks ("A1") or groups ("A", "B", "K", "U"); all by default.
        smoke: 32 training examples and 16 of validation and test per task, instead of 400, 100 and 100.
        pixels: side of the pictures.
        workers: processes that render pictures.
    """
    from lightning_pfl.benchmark.suite.build import build as build_suite
    from lightning_pfl.benchmark.suite.recipes import SMOKE, STANDARD

    console, specs = Console(), _chosen(names)
    library = _library(console)
    check = _option_check(console)
    with _errors(), _bar(console) as bar:
        whole = bar.add_task("tasks", total=len(specs))
        started: dict[str, object] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in started:
                started[name] = True
                bar.update(whole, description=name, completed=len(started) - 1)
            bar.update(whole, description=f"{name} ({done} of {total} pictures)")

        sizes = SMOKE if smoke else STANDARD
        build_suite(specs, library, root, sizes=sizes, pixels=pixels, workers=workers, check=check, progress=progress)
        bar.update(whole, completed=len(specs), description="done")
    console.print(f"wrote {len(specs)} tasks, scenarios, task_graph.json and LICENCES.md to {root}")


def verify(root: Path, *, quick: bool = False) -> None:
    """Check what was built: digests, splits, balance, leaks between the sides, options; print the licences.

    Args:
        root: folder that `build` wrote.
        quick: leave out the search for near-duplicates, which opens every source picture.
    """
    from lightning_pfl.benchmark.suite.build import licence_list
    from lightning_pfl.benchmark.suite.verify import verify as verify_suite

    console = Console()
    library = _library(console)
    with _errors(), console.status("checking") as status:
        problems = verify_suite(
            root, library, check=_option_check(console), near=not quick, step=lambda what: status.update(what)
        )
    console.print(licence_list(root))
    for problem in problems:
        console.print(f"[red]{problem.task}[/red]: {problem.what}", soft_wrap=True)
    if problems:
        sys.exit(f"{len(problems)} problems")
    console.print("everything holds")


def show(output: Path, names: Sequence[str] = (), *, examples: int = 2, pixels: int = 128) -> None:
    """Draw examples of tasks on one sheet, as a person sees them.

    Args:
        output: PNG file to write.
        names: tasks ("A1") or groups ("A", "B", "K", "U"); all by default.
        examples: per task.
        pixels: side of each picture.
    """
    from lightning_pfl.benchmark.suite.recipes import Sizes, build_task
    from lightning_pfl.benchmark.suite.sheets import Row, contact_sheet

    console, specs = Console(), _chosen(names)
    library = _library(console)
    with _errors():
        sizes = Sizes(examples, 1, 1)
        rows = [Row(f"{spec.name}: {spec.asks}", build_task(spec, library, sizes).train) for spec in specs]
        contact_sheet(rows, pixels=pixels).save(output)
    console.print(f"wrote {output}")


_NAMES = ("names", {"nargs": "*", "help": "tasks (A1) or groups (A, B, K, U); all by default"})
_PIXELS = ("--pixels", {"type": int, "default": 128, "help": "side of the pictures"})

COMMANDS: Mapping[Callable[..., None], Sequence[tuple[str, Mapping[str, Any]]]] = {
    tasks: (_NAMES,),
    build: (
        ("root", {"type": Path, "help": "folder to write into"}),
        _NAMES,
        ("--smoke", {"action": "store_true", "help": "32 training examples per task instead of 400"}),
        _PIXELS,
        ("--workers", {"type": int, "default": 1, "help": "processes that render pictures"}),
    ),
    verify: (
        ("root", {"type": Path, "help": "folder that `build` wrote"}),
        ("--quick", {"action": "store_true", "help": "leave out the search for near-duplicates"}),
    ),
    show: (
        ("output", {"type": Path, "help": "PNG file to write"}),
        _NAMES,
        ("--examples", {"type": int, "default": 2, "help": "per task"}),
        _PIXELS,
    ),
}
"""What `lightning-pfl benchmark` offers, and the arguments of each command."""


def _chosen(names: Sequence[str]) -> tuple[TaskSpec, ...]:
    from lightning_pfl.benchmark.suite.catalogue import UnknownTaskError, find_tasks

    try:
        return find_tasks(names)
    except UnknownTaskError as error:
        sys.exit(str(error.args[0]))


@contextmanager
def _errors() -> Iterator[None]:
    """What a user can mend is said in one line, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(str(error))


@contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        yield bar


def _library(console: Console) -> Library:
    """The pictures, with a bar for what has to be fetched first."""
    from lightning_pfl.benchmark.suite.library import load_library

    with _errors(), _bar(console) as bar:
        rows: dict[str, object] = {}

        def report(label: str, done: int, total: int | None) -> None:
            if label not in rows:
                rows[label] = bar.add_task(label, total=total)
            bar.update(rows[label], completed=done, total=total)  # type: ignore[arg-type]  # rich's own task id

        return load_library(report=report)


def _option_check(console: Console) -> Callable[[Task], None]:
    from lightning_pfl.benchmark.suite.options import check_options, tokenizers_at_hand

    tokenizers = tokenizers_at_hand()
    if not tokenizers:
        console.print("No packaged language model was fetched yet: first tokens of options are not checked.")
    return lambda task: check_options(task, tokenizers)
