"""DRAKE's JSON format: records with image paths and a conversation, read and written.

`read_records` reads the published data and our own alike; `write_task` renders a task's pictures and writes it so that
the reference's own code, and ours, can read it. A mistake in a file is an error that names the file and the record;
`mistakes.find_mistakes` collects all of a folder.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from upath import UPath

from lightning_pfl.benchmark.choices import choices_with, parse_choices
from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.locations import AnyPath, ImageFinder, as_path
from lightning_pfl.benchmark.tasks import IMAGE_MARK, Example, Task

__all__ = [
    "SPLITS",
    "RecordError",
    "UnknownTaskError",
    "finder_for",
    "identity_of",
    "parse_choices",
    "parse_record",
    "read_list",
    "read_records",
    "read_task",
    "records_path",
    "write_task",
]

_LOG = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


class RecordError(ValueError):
    """A record that cannot be used; the message begins with its file and number."""


class UnknownTaskError(FileNotFoundError):
    """A task that the data folder does not have; the message says what it has."""


def records_path(root: AnyPath, dataset: str, subset_id: int, split: str) -> AnyPath:
    """Where the format keeps the records of one subset: `<root>/<dataset>/<split>/dataset-<subset_id>.json`."""
    return root / dataset / split / f"dataset-{subset_id}.json"


def read_records(
    path: str | os.PathLike[str] | UPath,
    *,
    root: str | os.PathLike[str] | UPath | None = None,
    is_open: bool = False,
) -> list[Example]:
    """Read one JSON file of records.

    Args:
        path: `.../<root>/<dataset>/<split>/dataset-<n>.json`, local or an address that fsspec reads.
        root: folder that the image paths are relative to; the file's own root by default. The root's parent, the data
            set's own folder and the working directory are tried as well, because published paths differ in this.
        is_open: the questions are open (`Slot.is_open`): nothing in them is read as a list of choices.

    Returns:
        One example per record, in order; its id is `<dataset>-<n>/<split>/<index>`. Conversations of several turns give
        their first question; the log says how many had more.

    Raises:
        FileNotFoundError: no such file.
        RecordError: not a list of records, a missing field, a missing image, another number of `<image>` marks than
            pictures, or an answer that is none of the choices.
    """
    path = as_path(path)
    base: AnyPath = path.parent.parent.parent if root is None else as_path(root)
    finder, records = finder_for(path, base), read_list(path)
    examples = [
        parse_record(record, f"{path}#{index}", f"{identity_of(path)}/{index}", finder, is_open=is_open)
        for index, record in enumerate(records)
    ]
    if longer := sum(len(record["conversations"]) > 2 for record in records):
        _LOG.warning("%s: %d of %d records have further turns, which are left out.", path, longer, len(records))
    return examples


def read_task(
    root: str | os.PathLike[str] | UPath,
    dataset: str,
    subset_id: int,
    *,
    licences: Sequence[str] = (),
    is_open: bool = False,
) -> Task:
    """Read a whole task. Published data has no validation split; then `val` is the last fifth of `train`.

    Args:
        root: parent of the data set folders, local or an address that fsspec reads.
        dataset: name of the data set.
        subset_id: number of the subset in it.
        licences: of its pictures.
        is_open: see `read_records`.

    Raises:
        UnknownTaskError: no records of that name for train or test; the message says what there is.
        RecordError: see `read_records`; or a file for train or test that holds none.
    """
    root = as_path(root)
    paths = {split: records_path(root, dataset, subset_id, split) for split in SPLITS}
    for split in ("train", "test"):
        if not paths[split].exists():
            raise UnknownTaskError(f"{paths[split]} does not exist. {_what_there_is(root, dataset, split)}")
    train, test = (read_records(paths[split], root=root, is_open=is_open) for split in ("train", "test"))
    for split, examples in (("train", train), ("test", test)):
        if not examples:
            raise RecordError(
                f"{paths[split]} holds no records. Download it again; a client without data in a stretch of time has "
                "the data set `dummy` in its scenario."
            )
    if paths["val"].exists():
        val = read_records(paths["val"], root=root, is_open=is_open)
    else:
        first = len(train) - len(train) // 5
        train, val = train[:first], train[first:]
    return Task(f"{dataset}-{subset_id}", dataset, tuple(train), tuple(val), tuple(test), tuple(licences))


def write_task(task: Task, root: Path, *, dataset: str | None = None, subset_id: int = 0, size: int = 224) -> None:
    """Render a task's pictures as PNG files and write its three splits.

    Args:
        task: what to write.
        root: parent of the data set folders.
        dataset: name of the data set; the task's name by default.
        subset_id: number of the subset in the data set.
        size: side of the rendered pictures in pixels.
    """
    dataset = dataset or task.name
    folder = root / dataset / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for split, examples in zip(SPLITS, (task.train, task.val, task.test), strict=True):
        records = []
        for example in examples:
            names = []
            for view in example.images:
                target = folder / f"{view.key(size)[:32]}.png"
                if not target.exists():
                    view.render(size).save(target)
                names.append(f"{dataset}/images/{target.name}")
            turns = [{"from": "human", "value": example.question}, {"from": "gpt", "value": example.answer}]
            records.append({"id": example.id, "image": names, "conversations": turns, "licences": list(task.licences)})
        written = records_path(root, dataset, subset_id, split)
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf8")


def read_list(path: AnyPath) -> list[Any]:
    """The records of a file as JSON gives them.

    Raises:
        FileNotFoundError: no such file.
        RecordError: it is not JSON in UTF-8, or not a list.
    """
    try:
        records = json.loads(path.read_bytes().decode("utf8"))
    except (ValueError, RecursionError) as error:  # bytes that are no text, numbers and nesting without end, too
        raise RecordError(f"{path} is not JSON: {error}") from error
    if not isinstance(records, list):
        raise RecordError(f"{path} must hold a list of records, but holds a {type(records).__name__}.")
    return records


def finder_for(path: AnyPath, root: AnyPath) -> ImageFinder:
    """Where the pictures of a file's records are looked up."""
    return ImageFinder((root, root.parent, root / path.parent.parent.name, Path()))


def identity_of(path: AnyPath) -> str:
    """What the ids of a file's examples begin with: `<dataset>-<n>/<split>`."""
    return f"{path.parent.parent.name}-{path.stem.removeprefix('dataset-')}/{path.parent.name}"


def parse_record(record: Any, where: str, identity: str, finder: ImageFinder, *, is_open: bool = False) -> Example:
    """One record as an example.

    Args:
        record: what JSON gave.
        where: its file and number, for messages.
        identity: the example's id.
        finder: where pictures are looked up.
        is_open: an open question, even if its prompt looks as if it listed answers.

    Raises:
        RecordError: see `read_records`.
    """
    if not isinstance(record, Mapping):
        raise RecordError(
            f"{where} must be an object with `image` and `conversations`, but is {type(record).__name__}."
        )
    turns = record.get("conversations")
    if (
        not isinstance(turns, list)
        or len(turns) < 2
        or not all(isinstance(turn, dict) and "value" in turn for turn in turns)
    ):
        raise RecordError(
            f"{where} must have `conversations` with at least a question and an answer, each with a `value`."
        )
    question, answer = str(turns[0]["value"]), str(turns[1]["value"]).strip()
    images = _images(record.get("image"), where, finder)
    marks = question.count(IMAGE_MARK)
    if marks > len(images) or 0 < marks < len(images):
        only = "only " if marks < len(images) else ""
        raise RecordError(f"{where} has {only}{marks} {IMAGE_MARK} marks for {len(images)} pictures.")
    if images and not marks:
        question = IMAGE_MARK * len(images) + " " + question
    choices, right = ((), answer) if is_open else choices_with(question, answer)
    if right is None:
        raise RecordError(f"{where} has the answer {answer!r}, which is none of its choices {list(choices)}.")
    return Example(identity, images, question, right, choices)


def _images(names: Any, where: str, finder: ImageFinder) -> tuple[View, ...]:
    listed = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(listed, list) or not all(isinstance(name, str) and name for name in listed):
        raise RecordError(f"{where} must have a path or a list of paths as `image`, but has {names!r}.")
    views = []
    for name in listed:
        path = finder.find(name)
        if path is None:
            raise RecordError(
                f"{where} names the image {name}, which is under none of {[str(place) for place in finder.places]}."
            )
        views.append(View(path))
    return tuple(views)


def _what_there_is(root: AnyPath, dataset: str, split: str) -> str:
    if not root.exists():
        return f"There is no folder {root}."
    if not (root / dataset).exists():
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        return f"{root} has no data set {dataset}; it has {found}. Download it, or take it out of the scenario."
    folder = root / dataset / split
    subsets = sorted(entry.stem.removeprefix("dataset-") for entry in folder.iterdir()) if folder.exists() else []
    return f"Of {dataset} there are the {split} subsets {subsets}."
