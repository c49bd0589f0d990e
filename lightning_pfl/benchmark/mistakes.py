"""Everything that is wrong with a folder of published data, in one list.

Start at `find_mistakes`. Reading stops at the first mistake, because a wrong record must not become a wrong number;
before a long run one would rather know them all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError
from upath import UPath

from lightning_pfl.benchmark.locations import AnyPath, as_path
from lightning_pfl.benchmark.records import (
    RecordError,
    finder_for,
    identity_of,
    parse_record,
    read_list,
    records_path,
)
from lightning_pfl.benchmark.scenarios import Scenario

__all__ = ["Mistake", "find_mistakes"]


@dataclass(frozen=True)
class Mistake:
    """Something that cannot be used.

    Attributes:
        file: of records, or the folder that lacks one.
        record: its number in the file; None where the whole file is meant.
        message: what is wrong.
    """

    file: str
    record: int | None
    message: str


def find_mistakes(
    root: str | os.PathLike[str] | UPath,
    *,
    scenario: Scenario | None = None,
    open_images: bool = True,
    report: Callable[[str], None] | None = None,
) -> list[Mistake]:
    """Read every record below a folder and say what is wrong.

    Args:
        root: parent of the data set folders, local or an address that fsspec reads.
        scenario: look only at its tasks, each of which must be there for training and test; and take its word for
            which questions are open. None: every subset of every data set that is there.
        open_images: decode every picture to its last byte, which finds truncated ones.
        report: called with the name of each file before it is read.

    Returns:
        Mistakes in the order of files and records; empty if all is well.
    """
    root = as_path(root)
    found: list[Mistake] = []
    opened: dict[AnyPath, str | None] = {}
    for path, is_open in _files(root, scenario):
        if report is not None:
            report(str(path))
        if not path.exists():
            found.append(Mistake(str(path), None, f"{path} does not exist."))
            continue
        try:
            records = read_list(path)
        except RecordError as error:
            found.append(Mistake(str(path), None, str(error)))
            continue
        if not records:
            found.append(Mistake(str(path), None, f"{path} holds no records."))
        finder = finder_for(path, root)
        for index, record in enumerate(records):
            where = f"{path}#{index}"
            try:
                example = parse_record(record, where, f"{identity_of(path)}/{index}", finder, is_open=is_open)
            except RecordError as error:
                found.append(Mistake(str(path), index, str(error)))
                continue
            for view in example.images if open_images else ():
                if view.path not in opened:
                    opened[view.path] = _damage(view.path)
                if (damage := opened[view.path]) is not None:
                    found.append(Mistake(str(path), index, f"{where} shows {view.path}, which is damaged: {damage}"))
    return found


def _files(root: AnyPath, scenario: Scenario | None) -> Iterator[tuple[AnyPath, bool]]:
    """Files of records that must be there, with whether their questions are open."""
    if scenario is not None:
        for slot in scenario.slots:
            for split in ("train", "test"):
                yield records_path(root, slot.dataset, slot.subset_id, split), slot.is_open
            if (held_out := records_path(root, slot.dataset, slot.subset_id, "val")).exists():
                yield held_out, slot.is_open
        return
    subsets: dict[str, set[str]] = {}
    for folder in sorted((entry for entry in root.iterdir() if entry.is_dir()), key=lambda entry: entry.name):
        for split in ("train", "val", "test"):
            if (folder / split).exists():
                there = (entry.name for entry in (folder / split).iterdir())
                subsets.setdefault(folder.name, set()).update(
                    name for name in there if name.startswith("dataset-") and name.endswith(".json")
                )
    for dataset, names in subsets.items():
        for name in sorted(names):
            for split in ("train", "val", "test"):
                path = root / dataset / split / name
                if split != "val" or path.exists():
                    yield path, False


def _damage(path: AnyPath) -> str | None:
    """Why a picture cannot be shown; None if it can."""
    try:
        with path.open("rb") as stream:
            Image.open(stream).load()
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        return str(error)
    return None
