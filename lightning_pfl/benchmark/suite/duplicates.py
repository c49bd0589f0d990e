"""Pictures that look like one of another side of the split, and are therefore shown by no task.

The list was measured by `benchmarks/near_duplicates.py` and is kept as data, so that a build neither depends on how a
rasteriser rounds nor takes minutes to compare.
"""

from __future__ import annotations

import functools
from importlib import resources


@functools.cache
def left_out() -> frozenset[str]:
    """First 16 hex characters of the sha256 of each file that is left out."""
    text = (resources.files("lightning_pfl.benchmark.suite") / "duplicates.txt").read_text(encoding="utf8")
    return frozenset(line.split()[0] for line in text.splitlines() if line and not line.startswith("#"))
