"""What the suite promises, checked on what was built: digests, splits, balance, leaks, options, licences.

Start at `verify`. It draws every task again from the packages and compares; nothing is repaired.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from lightning_pfl.benchmark.composition import files_of
from lightning_pfl.benchmark.images import View, open_square
from lightning_pfl.benchmark.near_duplicates import alike
from lightning_pfl.benchmark.records import RecordError, read_task
from lightning_pfl.benchmark.suite.build import read_manifest, views_of
from lightning_pfl.benchmark.suite.catalogue import UnknownTaskError, find_task
from lightning_pfl.benchmark.suite.digests import expected_digests, pixels_of, record_digests, task_digests
from lightning_pfl.benchmark.suite.library import SPLITS, Library
from lightning_pfl.benchmark.suite.recipes import SUITE, Sizes, build_task
from lightning_pfl.benchmark.suite.rendering import picture_path
from lightning_pfl.benchmark.tasks import Example, Task

_SAMPLED = 12  # pictures per task that are rendered again and compared pixel by pixel
_MARGIN = 4  # standard deviations by which a place that is drawn may exceed its share


@final
@dataclass(frozen=True)
class Problem:
    """Something that does not hold: where, and what."""

    task: str
    what: str


def verify(
    root: Path,
    library: Library,
    *,
    check: Callable[[Task], None] | None = None,
    near: bool = True,
    step: Callable[[str], None] | None = None,
) -> list[Problem]:
    """Check every built task below a folder.

    Args:
        root: folder that `build.build` wrote.
        library: the pictures.
        check: called with each task; a ValueError that it raises is a problem (first tokens of options, say).
        near: also look for near-duplicates between the sides, which opens every source picture.
        step: called with what is being checked.

    Returns:
        What does not hold; empty if all does.

    Raises:
        FileNotFoundError: nothing is built there.
    """
    manifests = sorted(root.glob("*/manifest.json"))
    if not manifests:
        raise FileNotFoundError(f"{root} holds no built task. Make one: lightning-pfl benchmark build {root}")
    problems: list[Problem] = []
    tasks: list[Task] = []
    for path in manifests:
        if step is not None:
            step(path.parent.name)
        manifest = read_manifest(path)
        if manifest["suite"] != SUITE:
            problems.append(Problem(path.parent.name, f"was built by {manifest['suite']}, but this is {SUITE}"))
            continue
        try:
            spec = find_task(str(manifest["task"]))
        except UnknownTaskError as error:
            problems.append(Problem(path.parent.name, str(error.args[0])))
            continue
        sizes, pixels = Sizes(**manifest["sizes"]), int(manifest["pixels"])
        task = build_task(spec, library, sizes)
        tasks.append(task)
        found = [*_files(task, root, manifest["records"], sizes, pixels), *_balance(task, spec.goals)]
        if not manifest["licences"] or not manifest["sources"]:
            found.append("names no licence or no source")
        if check is not None:
            try:
                check(task)
            except ValueError as error:
                found.append(str(error))
        problems += [Problem(spec.name, what) for what in found]
    if step is not None:
        step("leaks between the sides")
    return problems + leaks(tasks, near=near)


def leaks(tasks: Sequence[Task], *, near: bool = True) -> list[Problem]:
    """Pictures that are shown on two sides of the split, by any of the tasks, or that look like one of another side."""
    shown: dict[Path, dict[str, str]] = {}
    for task in tasks:
        for split, examples in zip(SPLITS, (task.train, task.val, task.test), strict=True):
            for example in examples:
                for view in example.images:
                    for path in files_of(view):
                        shown.setdefault(path, {}).setdefault(split, task.name)
    problems = [
        Problem(min(sides.values()), f"{path} is shown on several sides: {sides}")
        for path, sides in shown.items()
        if len(sides) > 1
    ]
    if near:
        paths = [path for path, sides in shown.items() if len(sides) == 1]
        sides = [next(iter(shown[path])) for path in paths]
        for pair in alike([open_square(path, 96) for path in paths], [SPLITS.index(side) for side in sides]):
            one, two = paths[pair.first], paths[pair.second]
            problems.append(
                Problem(
                    shown[one][sides[pair.first]],
                    f"{one} ({sides[pair.first]}) looks like {two} ({sides[pair.second]}): "
                    f"{pair.difference:.3f}, {pair.correlation:.3f}",
                )
            )
    return problems


def _files(task: Task, root: Path, built: Mapping[str, str], sizes: Sizes, pixels: int) -> Iterator[str]:
    """Whether records and pictures are those that the packages give here, and that they give everywhere."""
    folder = root / task.name / "images"
    views = views_of(task)
    missing = [path for view in views if not (path := picture_path(folder, view, pixels)).exists()]
    if missing:
        yield f"{len(missing)} pictures are missing, {missing[0]} among them; delete the manifest and build again"
    try:
        read, records = read_task(root, task.name, 0), record_digests(root, task.name)
    except (RecordError, FileNotFoundError) as error:
        yield str(error)
        return
    if records != dict(built):
        yield "a JSON file is not the one that was built"
    for split in SPLITS:
        drawn, found = getattr(task, split), getattr(read, split)
        if [_said(example) for example in drawn] != [_said(example) for example in found]:
            yield f"the {split} records differ from what these packages give"
        named = [[picture_path(folder, view, pixels).name for view in example.images] for example in drawn]
        if named != [[view.path.name for view in example.images] for example in found]:
            yield f"the {split} records name other pictures than these packages give"
    wrong: list[str] = []
    here = task_digests(records, _contents(views, folder, pixels, wrong))
    yield from wrong
    everywhere = expected_digests(task.name, sizes, pixels)
    if everywhere is None:
        return
    for split in SPLITS:
        mine, theirs = here.records[split], everywhere.records[split]
        if mine != theirs:
            yield f"the {split} records have sha256 {mine}, but everywhere else {theirs}"
    if not missing and not wrong and everywhere.pictures not in (None, here.pictures):
        yield (
            f"the pictures have sha256 {here.pictures}, but {everywhere.pictures} with the versions of "
            "constraints.txt; are pillow, numpy and resvg_py other ones here?"
        )


def _contents(views: Sequence[View], folder: Path, pixels: int, wrong: list[str]) -> Iterator[bytes]:
    """Pixels of every picture file that is there, in order; what is wrong with one goes to the list."""
    files: dict[Path, View] = {}
    for view in views:
        files.setdefault(picture_path(folder, view, pixels), view)
    step = max(1, len(files) // _SAMPLED)
    for index, (path, view) in enumerate(files.items()):
        try:
            content = pixels_of(path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            wrong.append(f"{path} is damaged ({error}); delete it and the manifest and build again")
            continue
        if index % step == 0 and content != view.render(pixels).tobytes():
            wrong.append(f"{path} has other pixels than are rendered here; were the versions those of constraints.txt?")
        yield content


def _balance(task: Task, goals: Sequence[str]) -> Iterator[str]:
    """Whether no answer leads by more than one, and, where examples offer different choices, no place among them.

    Answers are dealt out in turn, so they are counted; those of B7 are lines drawn for its goals. Places are drawn.
    """
    for split in SPLITS:
        examples: tuple[Example, ...] = getattr(task, split)
        offered = {example.choices for example in examples}
        dealt = next(iter(offered)) if len(offered) == 1 else goals
        counts = Counter(example.answer for example in examples)
        if counts.keys() <= set(dealt) and max(counts.values()) - min(counts[goal] for goal in dealt) > 1:
            yield f"the answers of {split} are not balanced: {dict(counts)}"
        if len(offered) > 1:
            yield from _places(split, examples)


def _places(split: str, examples: Sequence[Example]) -> Iterator[str]:
    """Places among the choices that hold the right answer more often than their share and a margin."""
    counts = Counter(example.choices.index(example.answer) for example in examples)
    for place, count in sorted(counts.items()):
        shares = [1 / len(example.choices) for example in examples if place < len(example.choices)]
        most = sum(shares) + _MARGIN * math.sqrt(sum(share * (1 - share) for share in shares))
        if count > most:
            yield f"place {place} holds the right answer of {count} {split} examples, but may of {most:.1f} at most"


def _said(example: Example) -> tuple[str, str]:
    return example.question, example.answer
