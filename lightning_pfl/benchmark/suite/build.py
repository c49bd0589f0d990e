"""The suite as files: records, pictures, scenarios, task graph and licences in one folder.

Start at `build`. It can be stopped at any time and called again: a finished picture is never rendered twice, and a
task whose manifest says that it is whole is passed over, unless its records are known to be others by now.

    <root>/<task>/{train,val,test}/dataset-0.json   records of the published form
    <root>/<task>/images/<key>.png                  pictures; the key says what decides the pixels
    <root>/<task>/manifest.json                     sizes, licences, sources, digests
    <root>/scenarios/*.json, task_graph.json, LICENCES.md
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from filelock import FileLock

from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.records import write_task
from lightning_pfl.benchmark.suite.digests import expected_digests, record_digests, task_digests
from lightning_pfl.benchmark.suite.graph import LINKS
from lightning_pfl.benchmark.suite.library import Library
from lightning_pfl.benchmark.suite.recipes import STANDARD, SUITE, Sizes, TaskSpec, build_task, sources_of
from lightning_pfl.benchmark.suite.rendering import picture_path, render_all
from lightning_pfl.benchmark.suite.scenario import write_scenarios
from lightning_pfl.benchmark.tasks import Task

_LOG = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with (task name, pictures done, pictures in all) while a task is built."""

_CHUNK = 64


def build(
    specs: Sequence[TaskSpec],
    library: Library,
    root: Path,
    *,
    sizes: Sizes = STANDARD,
    pixels: int = 128,
    workers: int = 1,
    check: Callable[[Task], None] | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write tasks and what goes with them. A second build into the same folder waits for the first one.

    Args:
        specs: which tasks.
        library: the pictures.
        root: folder of the suite; made when missing.
        sizes: examples per split.
        pixels: side of the pictures.
        workers: processes that render; 1 renders in this one.
        check: called with each task before it is written, to refuse it (first tokens of its options, say).
        progress: callback.

    Returns:
        The manifests, one per task.

    Raises:
        ValueError: a task that cannot be made, or a folder that holds a task of another suite, size or resolution.
    """
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".build.lock"), _renderer(workers) as render:
        paths = [_built(spec, library, root, sizes, pixels, render, check, progress) for spec in specs]
        write_scenarios(root / "scenarios")
        _write(root / "task_graph.json", json.dumps([asdict(link) for link in LINKS], indent=1) + "\n")
        _write(root / "LICENCES.md", licence_list(root))
    return paths


def read_manifest(path: Path) -> Mapping[str, Any]:
    """A task's manifest.

    Raises:
        ValueError: it is not whole; the message says what to do.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}). Delete it and build again.") from error


def licence_list(root: Path) -> str:
    """Every built task with its sources and their licences, as Markdown."""
    lines = ["# Licences", "", "| task | source | licence |", "| --- | --- | --- |"]
    for path in sorted(root.glob("*/manifest.json")):
        manifest = read_manifest(path)
        lines += [f"| {manifest['task']} | {source} | {licence} |" for source, licence in manifest["sources"].items()]
    return "\n".join(lines) + "\n"


def views_of(task: Task) -> list[View]:
    """All views that a task shows, each once."""
    examples = (*task.train, *task.val, *task.test)
    return list(dict.fromkeys(view for example in examples for view in example.images))


def _built(
    spec: TaskSpec,
    library: Library,
    root: Path,
    sizes: Sizes,
    pixels: int,
    render: _Render,
    check: Callable[[Task], None] | None,
    progress: Progress | None,
) -> Path:
    """The manifest of one task, which is written last: where it is, the task is whole."""
    target = root / spec.name / "manifest.json"
    wanted = {"suite": SUITE, "sizes": asdict(sizes), "pixels": pixels}
    if target.exists():
        found = read_manifest(target)
        if any(found.get(key) != value for key, value in wanted.items()):
            kept = {key: found.get(key) for key in wanted}
            raise ValueError(
                f"{target.parent} holds {kept}, but {wanted} is asked for. Build into another folder, or delete it."
            )
        if not _is_outdated(spec.name, found, sizes, pixels):
            if progress is not None:
                progress(spec.name, 1, 1)
            return target
        _LOG.warning("%s holds records of an older recipe and is built again.", target.parent)
        target.unlink()
    task = build_task(spec, library, sizes)
    if check is not None:
        check(task)
    _pictures(task, root / spec.name / "images", pixels, render, progress)
    write_task(task, root, dataset=spec.name, size=pixels)
    manifest = {
        **wanted,
        "task": spec.name,
        "analogue": spec.analogue,
        "asks": spec.asks,
        "type": spec.kind,
        "licences": list(task.licences),
        "sources": dict(sources_of(task, library)),
        "records": record_digests(root, spec.name),
    }
    _write(target, json.dumps(manifest, indent=1) + "\n")
    return target


def _is_outdated(name: str, manifest: Mapping[str, Any], sizes: Sizes, pixels: int) -> bool:
    """Whether a finished task has other records than are kept for its sizes and resolution; False where none are."""
    kept = expected_digests(name, sizes, pixels)
    return kept is not None and task_digests(manifest.get("records", {}), []).records != kept.records


def _pictures(task: Task, folder: Path, pixels: int, render: _Render, progress: Progress | None) -> None:
    """Render what is missing, and clear away what a build that was killed left half written."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".*.part"):
        stale.unlink()
    views = views_of(task)
    missing = [view for view in views if not picture_path(folder, view, pixels).exists()]
    done = len(views) - len(missing)
    for count in render([missing[at : at + _CHUNK] for at in range(0, len(missing), _CHUNK)], folder, pixels):
        done += count
        if progress is not None:
            progress(task.name, done, len(views))


_Render = Callable[[Sequence[Sequence[View]], Path, int], Iterator[int]]
"""Renders chunks of views into a folder at a resolution, and says after each how many it held."""


@contextmanager
def _renderer(workers: int) -> Iterator[_Render]:
    """In this process, or in workers that live as long as the build and so keep the source pictures they opened."""
    if workers <= 1:
        yield lambda chunks, folder, pixels: (render_all(chunk, folder, pixels) for chunk in chunks)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield lambda chunks, folder, pixels: pool.map(
            render_all, chunks, [folder] * len(chunks), [pixels] * len(chunks)
        )


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(text, encoding="utf8")
    os.replace(partial, path)
