"""`RoundLog`: a record of every round of a run, of which only the newest are in memory.

Start at `RoundLog`. Rounds are packed into blocks of a hundred or of about a mebibyte, and full ones go where the
clients' states go: to the run's temporary folder, or under the URL of its `ClientStore`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, final, overload

import torch
from torch import Tensor

from lightning_pfl.errors import CheckpointMismatchError
from lightning_pfl.federation.blobs import Blobs
from lightning_pfl.federation.state_bytes import pack, unpack

__all__ = ["RoundLog"]

_FULL = 2**20  # bytes of a block
_MANY = 100  # rounds of a block: the smallest record takes some kilobytes of memory, in small pieces among others


class _Dumps(Protocol):
    def dump(self) -> dict[str, Any]:
        """Plain containers and tensors; one entry is ``client_ids``."""


Record = TypeVar("Record", bound=_Dumps)


@dataclass(frozen=True, slots=True)
class _Block:
    """Some rounds in a row, out of memory.

    Attributes:
        name: of the log.
        sha256: of its bytes, which names it.
        first: index of the first record.
        count: how many records.
    """

    name: str
    sha256: str
    first: int
    count: int

    @property
    def key(self) -> str:
        return f"_{self.name}/{self.sha256}.rounds"  # no client's folder begins with an underscore

    @property
    def what(self) -> str:
        return f"the {self.name} of rounds {self.first} to {self.first + self.count - 1}"


@final
class RoundLog(Sequence[Record], Generic[Record]):
    """One record per round, in order; it grows with the run it belongs to, memory does not.

    Args:
        name: of what is recorded, for a folder and for errors.
        load: undoes a record's `dump`.
        blobs: where blocks go.

    Example:
        >>> from lightning_pfl.federation.history import RelevanceRecord
        >>> log = RoundLog("relevance", RelevanceRecord.load, Blobs())
        >>> log.append(RelevanceRecord(0, ("a", "b"), torch.eye(2), None))
        >>> len(log), log[-1].weights
        (1, tensor([[1., 0.],
                [0., 1.]]))
    """

    def __init__(self, name: str, load: Callable[[Mapping[str, Any]], Record], blobs: Blobs) -> None:
        self._name = name
        self._load = load
        self._blobs = blobs
        self._blocks: list[_Block] = []
        self._newest: list[Record] = []
        self._nbytes = 0  # of the newest

    def __len__(self) -> int:
        """How many rounds."""
        return self._stored + len(self._newest)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """A round, or several as a list.

        Raises:
            IndexError: no such round.
            CheckpointMismatchError: what was stored of it is damaged or gone, as by a later run without a URL.
        """
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"There are {len(self)} rounds, but number {index} was asked for.")
        if at >= self._stored:
            return self._newest[at - self._stored]
        block = next(block for block in self._blocks if at < block.first + block.count)
        return self._read(block)[at - block.first]

    def __iter__(self) -> Iterator[Record]:
        """All rounds, with one block of them in memory at a time."""
        for block in tuple(self._blocks):
            yield from self._read(block)
        yield from tuple(self._newest)

    def append(self, record: Record) -> None:
        """Add a round. Nothing is written, so nothing can fail: see `settle`."""
        self._newest.append(record)
        self._nbytes += _nbytes(record.dump())

    def settle(self) -> None:
        """Move the newest rounds out of memory, if there are enough of them for a block.

        Raises:
            OSError: it cannot be written. They are still in memory then.
        """
        if len(self._newest) < _MANY and self._nbytes < _FULL:
            return
        data = pack([record.dump() for record in self._newest])
        block = _Block(self._name, hashlib.sha256(data).hexdigest(), self._stored, len(self._newest))
        self._blobs.write(block.key, data, block.what)
        self._blocks.append(block)
        self._newest, self._nbytes = [], 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: blocks by name if they lie under a URL, else all of it. Loads with
        ``weights_only=True``.
        """
        held = self._blocks if self._blobs.url is None else []
        return {
            "blocks": [[block.sha256, block.count] for block in self._blocks],
            "held": {block.sha256: _as_tensor(self._bytes(block)) for block in held},
            "newest": [record.dump() for record in self._newest],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Undo `state_dict`.

        Raises:
            CheckpointMismatchError: blocks that the checkpoint names are not under this URL.
        """
        blocks: list[_Block] = []
        first = 0
        for sha256, count in saved["blocks"]:
            block = _Block(self._name, sha256, first, count)
            if sha256 in saved["held"]:
                self._blobs.write(block.key, saved["held"][sha256].numpy().tobytes(), block.what)
            elif not self._blobs.exists(block.key):
                raise CheckpointMismatchError(
                    f"The checkpoint refers to {block.what}, but the store {self._blobs.url} lacks it ({block.key}). "
                    "Was it moved or cleaned? Give the store the URL where it lies."
                )
            blocks.append(block)
            first += count
        self._blocks, self._newest = blocks, [self._load(entry) for entry in saved["newest"]]
        self._nbytes = sum(map(_nbytes, saved["newest"]))

    @property
    def _stored(self) -> int:
        return self._blocks[-1].first + self._blocks[-1].count if self._blocks else 0

    def _bytes(self, block: _Block) -> bytes:
        return self._blobs.read(block.key, block.sha256, block.what)

    def _read(self, block: _Block) -> list[Record]:
        return [self._load(entry) for entry in unpack(self._bytes(block))]


def _nbytes(entry: Mapping[str, Any]) -> int:
    """About how long a record's dump is in a block."""
    tensors = (part.nbytes for part in entry.values() if isinstance(part, Tensor))
    return 100 + 10 * len(entry["client_ids"]) + sum(tensors)


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
