"""`Blobs`: bytes that a run keeps out of memory, on the local disk or anywhere fsspec reaches, whole or not at all."""

from __future__ import annotations

import hashlib
from typing import Any, final

import fsspec

from lightning_pfl.errors import CheckpointMismatchError
from lightning_pfl.federation.temporary import TemporaryFolder
from lightning_pfl.federation.whole_files import write_whole

__all__ = ["Blobs"]


@final
class Blobs:
    """Files by key under one root.

    Args:
        url: of the root: a folder, or any URL that fsspec knows. None: a temporary folder, made at first use, as most
            runs fit into memory.

    Example:
        >>> blobs = Blobs()
        >>> blobs.write("ward-3/1.state", b"one", "the state of client `ward-3`")
        True
        >>> blobs.exists("ward-3/1.state"), blobs.exists("ward-3/2.state")
        (True, False)
        >>> blobs.close()
    """

    def __init__(self, url: str | None = None) -> None:
        self.url = url
        self._folder: TemporaryFolder | None = None
        self._opened: tuple[Any, str] | None = None

    def write(self, key: str, data: bytes, what: str, *, private: bool = False) -> bool:
        """Write a file, unless one of its size is there; whether there was none.

        Args:
            key: a relative path.
            data: all of it.
            what: it is, for an error.
            private: whether only this user may read it, on a local disk; then it is written in any case.

        Raises:
            OSError: no room, no permission. What was there before is still there.
        """
        files, path = self._place(key)
        if not private and files.exists(path) and files.size(path) == len(data):
            return False
        try:
            write_whole(files, path, data, lasting=self.url is not None, private=private)  # checkpoints rely on it
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot store {what} ({len(data)} bytes): {error.strerror or error}. Give "
                "`ClientStore(url, max_memory=...)` a roomier place or more memory",
                path,
            ) from error
        return True

    def read(self, key: str, sha256: str, what: str) -> bytes:
        """Read a file.

        Args:
            key: a relative path.
            sha256: of what was written.
            what: it is, for an error.

        Raises:
            CheckpointMismatchError: it is damaged or gone.
        """
        files, path = self._place(key)
        try:
            data: bytes = files.cat_file(path)
        except FileNotFoundError as error:
            raise CheckpointMismatchError(
                f"{_capital(what)} is gone: there is no {path}. Resume from a checkpoint whose states are still there."
            ) from error
        if (digest := hashlib.sha256(data).hexdigest()) != sha256:
            raise CheckpointMismatchError(
                f"{_capital(what)} is damaged: {path} must have the sha256 {sha256[:12]}..., but has {digest[:12]}... "
                f"({len(data)} bytes). Resume from an earlier checkpoint."
            )
        return data

    def read_any(self, key: str) -> bytes | None:
        """Read a file that nobody knows the digest of; None if there is none."""
        files, path = self._place(key)
        return bytes(files.cat_file(path)) if files.exists(path) else None

    def exists(self, key: str) -> bool:
        """Whether there is such a file."""
        files, path = self._place(key)
        return bool(files.exists(path))

    def remove(self, key: str) -> None:
        """Remove a file if it is there."""
        files, path = self._place(key)
        if files.exists(path):
            files.rm_file(path)

    def close(self) -> None:
        """Remove the temporary folder; what lies under a URL stays."""
        self._opened = None
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def _place(self, key: str) -> tuple[Any, str]:
        """The file system, and a path in it."""
        if self._opened is None:
            if self.url is None:
                self._folder = TemporaryFolder()
            self._opened = fsspec.core.url_to_fs(self.url if self._folder is None else str(self._folder.path))
        files, root = self._opened
        return files, f"{root.rstrip('/')}/{key}"


def _capital(what: str) -> str:
    return what[0].upper() + what[1:]
