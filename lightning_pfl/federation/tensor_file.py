"""One file per run that holds its big tensors, so that all processes of a machine share one copy of a backbone.

Start at `TensorFile`, which the driver owns: it appends what is new and forgets everything at `close`. What travels is
a `TensorFileRef`; its `open` maps the file copy-on-write, so that reading costs no memory of one's own and writing in
place reaches nobody else. Which tensors go here is decided in `pickling`.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from dataclasses import dataclass
from types import TracebackType
from typing import final

from lightning_pfl.federation.temporary import TemporaryFolder

__all__ = ["TensorFile", "TensorFileRef"]

_ALIGNMENT = 64  # what torch's own CPU allocator gives; some kernels round differently on other alignments


@dataclass(frozen=True)
class TensorFileRef:
    """The first bytes of a tensor file, as anybody on the machine can open them.

    Attributes:
        path: where the file lies.
        nbytes: how much of it is meant; the file may have grown since.
        digest: sha256 over what was added up to there. Equal digests mean equal bytes.
    """

    path: str
    nbytes: int
    digest: str

    def open(self) -> mmap.mmap:
        """Map the file: reads are shared with every other process, writes stay in this one mapping.

        Raises:
            FileNotFoundError: the run that wrote the file is over, or the file lies on another machine.
        """
        try:
            with open(self.path, "rb") as file:
                if (size := os.fstat(file.fileno()).st_size) < self.nbytes:
                    raise ValueError(
                        f"The tensor file {self.path} must hold {self.nbytes} bytes, but has {size}: it was cut off. "
                        "Was the disk full, or the folder cleaned while the run was going on?"
                    )
                return mmap.mmap(file.fileno(), self.nbytes, access=mmap.ACCESS_COPY)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"The tensor file {self.path} of a snapshot is gone. It lives as long as the run that took the "
                "snapshot, and only on that machine; take a new snapshot."
            ) from error


@final
class TensorFile:
    """An append-only file in a folder of its own, which goes away with the run.

    Equal bytes are stored once for all snapshots of a run. Within one snapshot they are not: two tensors that merely
    have equal values must not come back as one.

    Args:
        folder: where to make the folder; None: the system's place for temporary files. It should be a local disk.

    Example:
        >>> with TensorFile() as file:
        ...     first = file.add(b"backbone", taken=set())
        ...     again = file.add(b"backbone", taken=set())
        ...     twin = file.add(b"backbone", taken={first})
        ...     bytes(file.ref().open()[first:first + 8])
        b'backbone'
        >>> first == again, first == twin
        (True, False)
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = TemporaryFolder(folder)
        self.path = self._folder.path / "tensors"
        self._file = open(self.path, "wb")  # noqa: SIM115 - closed in `close`
        self._nbytes = 0
        self._starts: dict[bytes, list[int]] = {}
        self._digest = hashlib.sha256()

    @property
    def nbytes(self) -> int:
        """How much has been written."""
        return self._nbytes

    def add(self, data: memoryview | bytes, *, taken: set[int]) -> int:
        """Store bytes and return where they start.

        Args:
            data: what to store; contiguous, of any format.
            taken: starts that the caller uses already for other bytes; the result is never among them.

        Raises:
            OSError: the disk is full, or the folder is gone.
        """
        data = memoryview(data).cast("B")
        content = hashlib.sha256(data).digest() + data.nbytes.to_bytes(8, "little")
        for start in self._starts.get(content, ()):
            if start not in taken:
                return start
        start = -(-self._nbytes // _ALIGNMENT) * _ALIGNMENT
        try:
            self._file.seek(start)
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write {data.nbytes} bytes of tensors to the run's temporary folder: {error.strerror}. Give it "
                "a roomier one (the environment variable TMPDIR)",
                str(self.path),
            ) from error
        self._nbytes = start + data.nbytes
        self._starts.setdefault(content, []).append(start)
        self._digest.update(start.to_bytes(8, "little") + content)
        return start

    def ref(self) -> TensorFileRef:
        """What has been written so far, as others can open it."""
        return TensorFileRef(str(self.path), self._nbytes, self._digest.hexdigest())

    def close(self) -> None:
        """Remove the file. Mappings that are open stay readable. Safe to call twice; happens by itself at exit."""
        self._file.close()
        self._folder.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
