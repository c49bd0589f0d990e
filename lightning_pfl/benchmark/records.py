"""DRAKE's JSON format: records with image paths and a conversation, read and written.

`read_records` reads the published data and our own alike; `write_task` renders a task's pictures and writes it so that
the reference's own code, and ours, can read it. A mistake in a file is an error that names the file and the record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.tasks import IMAGE_MARK, Example, Task

SPLITS = ("train", "val", "test")


class RecordError(ValueError):
    """A record that cannot be used; the message begins with its file and number."""


def records_path(root: Path, dataset: str, subset_id: int, split: str) -> Path:
    """Where the format keeps the records of one subset: `<root>/<dataset>/<split>/dataset-<subset_id>.json`."""
    return root / dataset / split / f"dataset-{subset_id}.json"


def read_records(path: Path, *, root: Path | None = None) -> list[Example]:
    """Read one JSON file of records.

    Args:
        path: `.../<root>/<dataset>/<split>/dataset-<n>.json`.
        root: folder that the image paths are relative to; the file's own root by default. The working directory, the
            root's parent and the data set's own folder are tried as well, because published paths differ in this.

    Returns:
        One example per record, in order; its id is `<dataset>-<n>/<split>/<index>`.

    Raises:
        FileNotFoundError: no such file.
        RecordError: not a list of records, a missing field, a missing image, or more `<image>` marks than pictures.
    """
    root = root or path.parent.parent.parent
    dataset, split = path.parent.parent.name, path.parent.name
    subset = path.stem.removeprefix("dataset-")
    try:
        records = json.loads(path.read_text(encoding="utf8"))
    except json.JSONDecodeError as error:
        raise RecordError(f"{path} is not JSON: {error}") from error
    if not isinstance(records, list):
        raise RecordError(f"{path} must hold a list of records, but holds a {type(records).__name__}.")
    places = (Path(), root, root.parent, root / dataset)
    return [
        _example(record, f"{path}#{index}", f"{dataset}-{subset}/{split}/{index}", places)
        for index, record in enumerate(records)
    ]


def read_task(root: Path, dataset: str, subset_id: int, *, licences: Sequence[str] = ()) -> Task:
    """Read a whole task. Published data has no validation split; then `val` is the last fifth of `train`.

    Raises:
        FileNotFoundError: no records of that name for train or test.
        RecordError: see `read_records`.
    """
    train = read_records(records_path(root, dataset, subset_id, "train"), root=root)
    test = read_records(records_path(root, dataset, subset_id, "test"), root=root)
    held_out = records_path(root, dataset, subset_id, "val")
    if held_out.exists():
        val = read_records(held_out, root=root)
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
        target = records_path(root, dataset, subset_id, split)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf8")


def parse_choices(question: str) -> tuple[str, ...]:
    """Answers named in a prompt of the published form; empty where it lists none.

    Source:
        The reference's `parse_choice_list`: text in brackets after "Choice list:" (any case, also "lists"), or in
        brackets on a line of its own; split at "|" if there is any, else at ",".

    Example:
        >>> parse_choices("<image> Which? Choice list:[red, dark blue]")
        ('red', 'dark blue')
    """
    match = re.search(r"choice lists?:\s*\[([^\]]*)\]", question, re.IGNORECASE) or re.search(
        r"\n \[([^\]]*)\]\n", question
    )
    if match is None:
        return ()
    parts = match[1].split("|" if "|" in match[1] else ",")
    return tuple(part.strip() for part in parts if part.strip())


def _example(record: Any, where: str, identity: str, places: Sequence[Path]) -> Example:
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
    names = record.get("image", [])
    names = [names] if isinstance(names, str) else list(names)
    images = tuple(View(_found(str(name), where, places)) for name in names)
    missing = len(images) - question.count(IMAGE_MARK)
    if missing < 0:
        raise RecordError(f"{where} has {question.count(IMAGE_MARK)} {IMAGE_MARK} marks for {len(images)} pictures.")
    if missing and IMAGE_MARK in question:
        raise RecordError(
            f"{where} has only {question.count(IMAGE_MARK)} {IMAGE_MARK} marks for {len(images)} pictures."
        )
    if missing:
        question = IMAGE_MARK * missing + " " + question
    return Example(identity, images, question, answer, parse_choices(question))


def _found(name: str, where: str, places: Sequence[Path]) -> Path:
    for place in places:
        if (place / name).is_file():
            return place / name
    raise RecordError(f"{where} names the image {name}, which is under none of {[str(place) for place in places]}.")
