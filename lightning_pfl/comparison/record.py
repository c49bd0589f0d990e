"""What a run leaves: one JSON file per method and seed, written whole or not at all.

Start at `Record`. A record says by its key which settings it belongs to, so that results of other settings are never
mixed in unnoticed.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_pfl.comparison.evaluation import Table
from lightning_pfl.comparison.newcomers import Arrival
from lightning_pfl.comparison.plan import slug

__all__ = ["Record", "Rows", "read_records", "record_path"]

Rows = Sequence[Sequence[float]]
"""A matrix as plain lists; None in the place of a number that does not exist."""


@dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        method: name as in tables.
        seed: of the run.
        key: digest of what decides the result (`Comparison.key`).
        about: the same in words: protocol, scenario, side, method.
        clients: ids, in the order of rows.
        models: of the clients.
        tasks: names, in the order of columns.
        own: which tasks each client has, in the order of time.
        chance: of each task.
        relations: how related clients are in truth.
        tables: what was evaluated.
        weights: the last round's mixtures, None where nothing was mixed.
        similarity: the last round's cosines of sketches, None without.
        sent: bytes that left each client; 0 where the server's rule looks at none.
        received: bytes that reached each client.
        operations: of all clients' training, in multiplications and additions of matrix products.
        seconds: of processor time, by what they were spent on.
        versions: of the libraries.
        newcomers: clients that came after the run.
    """

    method: str
    seed: int
    key: str
    about: Mapping[str, Any]
    clients: Sequence[str]
    models: Sequence[str]
    tasks: Sequence[str]
    own: Sequence[Sequence[str]]
    chance: Sequence[float]
    relations: Rows
    tables: Sequence[Table]
    weights: Rows | None
    similarity: Rows | None
    sent: Sequence[int]
    received: Sequence[int]
    operations: float
    seconds: Mapping[str, float]
    versions: Mapping[str, str] = field(default_factory=dict)
    newcomers: Sequence[Arrival] = ()

    def write(self, path: Path) -> None:
        """As JSON, in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        partial.write_text(self.line() + "\n", encoding="utf8")
        os.replace(partial, path)

    def line(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: str) -> Record:
        """Undo `line`.

        Raises:
            ValueError: it is no record.
        """
        try:
            entry = json.loads(text)
            entry["tables"] = [Table(**table) for table in entry["tables"]]
            entry["newcomers"] = [Arrival(**one) for one in entry.get("newcomers", ())]
            return Record(**entry)
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(f"This is no record of a run: {error}") from error


def record_path(folder: Path, method: str, seed: int) -> Path:
    """Where a run's record lies.

    Example:
        >>> record_path(Path("out"), "FedAvg, warm start", 3).as_posix()
        'out/runs/fedavg-warm-start/seed-3.json'
    """
    return folder / "runs" / slug(method) / f"seed-{seed}.json"


def read_records(place: Path) -> list[Record]:
    """All records of a folder (as `record_path` has them), or of a file with one per line that may be gzipped.

    They come in the comparison's order.

    Raises:
        ValueError: a file that is no record; the message names it.
        FileNotFoundError: there is none.
    """
    if place.is_file():
        text = gzip.decompress(place.read_bytes()).decode() if place.suffix == ".gz" else place.read_text("utf8")
        lines = [(f"{place}, line {n}", line) for n, line in enumerate(text.splitlines(), 1)]
    else:
        lines = [(str(path), path.read_text("utf8")) for path in sorted(place.glob("runs/*/seed-*.json"))]
    if not lines:
        raise FileNotFoundError(f"{place} holds no finished runs. `lightning-pfl benchmark run` makes them.")
    records = []
    for where, line in lines:
        try:
            records.append(Record.read(line))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return sorted(records, key=lambda record: (record.about.get("place", 0), record.method, record.seed))
