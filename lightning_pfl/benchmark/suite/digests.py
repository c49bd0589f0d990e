"""What a build must give, task by task: digests of the records and of all pixels, kept as data.

Start at `expected_digests` (what was measured once, under constraints.txt) and `task_digests` (what lies in a folder).
The list is written by `benchmarks/suite_digests.py`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import final

from PIL import Image

from lightning_pfl.benchmark.records import SPLITS, records_path
from lightning_pfl.benchmark.suite.recipes import STANDARD, SUITE, Sizes

PIXELS = 128
"""Side of the pictures for which digests are kept; sizes are `STANDARD`."""

_HEX = 16
_NONE = "-"


@final
@dataclass(frozen=True)
class TaskDigests:
    """First 16 hex characters of sha256 digests of one built task.

    Attributes:
        records: of each split's JSON file.
        pictures: of the pixels of all its picture files, in the order in which its records first name them; None
            where that was not measured.
    """

    records: Mapping[str, str]
    pictures: str | None


def expected_digests(task: str, sizes: Sizes, pixels: int) -> TaskDigests | None:
    """What a task's files must have; None for sizes or a resolution other than the standard ones.

    Args:
        task: its whole name.
        sizes: examples per split.
        pixels: side of the pictures.
    """
    return _kept().get(task) if sizes == STANDARD and pixels == PIXELS else None


def record_digests(root: Path, name: str) -> dict[str, str]:
    """sha256 of each split's JSON file of a task, 64 hex characters."""
    return {split: hashlib.sha256(records_path(root, name, 0, split).read_bytes()).hexdigest() for split in SPLITS}


def task_digests(records: Mapping[str, str], pictures: Iterable[bytes]) -> TaskDigests:
    """Digests of a task.

    Args:
        records: sha256 by split, as `record_digests` gives them.
        pictures: pixels of each picture, as `pixels_of` reads them, in order.
    """
    whole = hashlib.sha256()
    for content in pictures:
        whole.update(content)
    return TaskDigests({split: digest[:_HEX] for split, digest in records.items()}, whole.hexdigest()[:_HEX])


def pixels_of(path: Path) -> bytes:
    """RGB bytes of a picture file, whatever its compression.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged or truncated; the message does not name it.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB").tobytes()
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(str(error)) from error


def written_digests(found: Mapping[str, TaskDigests]) -> str:
    """The list as text: one line per task, under the suite's name."""
    lines = [
        " ".join([task, *(digests.records[split] for split in SPLITS), digests.pictures or _NONE])
        for task, digests in found.items()
    ]
    head = f"# {SUITE} at {PIXELS} pixels: task, {', '.join(SPLITS)} records, pictures (first 16 hex of the sha256)"
    return "\n".join([head, *lines]) + "\n"


@functools.cache
def _kept() -> Mapping[str, TaskDigests]:
    text = (resources.files("lightning_pfl.benchmark.suite") / "digests.txt").read_text(encoding="utf8")
    kept = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            task, *records, pictures = line.split()
            kept[task] = TaskDigests(dict(zip(SPLITS, records, strict=True)), None if pictures == _NONE else pictures)
    return kept
