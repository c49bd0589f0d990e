"""Views as PNG files, rendered here or by worker processes, each of which imports the package once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_pfl.benchmark.images import View


def picture_path(folder: Path, view: View, pixels: int) -> Path:
    """Where `records.write_task` keeps a view."""
    return folder / f"{view.key(pixels)[:32]}.png"


def render_all(views: Sequence[View], folder: Path, pixels: int) -> int:
    """Render views as PNG files that appear whole or not at all; returns how many."""
    for view in views:
        target = picture_path(folder, view, pixels)
        partial = target.with_name(f".{target.stem}.{os.getpid()}.part")
        view.render(pixels).save(partial, "PNG", compress_level=3)  # half the time of 6 for a tenth more bytes
        os.replace(partial, target)
    return len(views)
