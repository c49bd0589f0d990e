"""One line of JSON per run: what was run, where, and what it took."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Line", "read"]


@dataclass(frozen=True)
class Line:
    """One run of one system.

    Attributes:
        workload: its name.
        system: its name.
        repeat: from 0; systems take turns, so runs of one repeat are neighbours in time.
        cpu_total: CPU-seconds of the process tree, from start to end.
        cpu_imports: of them, until all modules were imported.
        cpu_start: from then on until the first round had ended; None if rounds are not told apart.
        cpu_round: mean of the later rounds.
        wall_total: seconds.
        wall_start: from the start of the process to the end of the first round.
        wall_round: median of the later rounds.
        pss_mib: the highest proportional memory of the tree.
        processes: the most at once.
        results: what the system itself says, such as the accuracy that it ends at.
        machine: versions, cores and load, so that lines of two machines are not taken for one's.
        error: why there is nothing else; empty if all went well.
    """

    workload: str
    system: str
    repeat: int = 0
    cpu_total: float = 0.0
    cpu_imports: float = 0.0
    cpu_start: float | None = None
    cpu_round: float | None = None
    wall_total: float = 0.0
    wall_start: float | None = None
    wall_round: float | None = None
    pss_mib: float = 0.0
    processes: int = 0
    results: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""

    def dump(self) -> str:
        """As JSON, without a line's end."""
        return json.dumps(asdict(self))

    def append_to(self, path: Path) -> None:
        """Add it to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(self.dump() + "\n")


def read(lines: Iterable[str]) -> list[Line]:
    """Lines of a file; empty ones are passed over.

    Raises:
        ValueError: one is no run; its number is said.
    """
    found = []
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            found.append(Line(**json.loads(text)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"Line {number} is no run of `benchmarks.engine`: {error}.") from error
    return found
