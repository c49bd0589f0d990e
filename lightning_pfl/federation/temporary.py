"""Folders that go away with the process that made them, also when it is killed.

Start at `TemporaryFolder`. It is removed when it is closed, at the latest when the process ends; if the process gets no
chance to do so, the next one on the machine that makes such a folder does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
import weakref
from pathlib import Path
from typing import final

from filelock import FileLock, Timeout

__all__ = ["TemporaryFolder", "hold", "sweep"]

_LOG = logging.getLogger(__name__)
_PREFIX = "lightning-pfl-"
_LOCK = "lock"
_SETTLED = 60.0  # seconds; a younger folder may be about to be locked


@final
class TemporaryFolder:
    """A folder of one's own.

    Args:
        parent: where to make it; None: the system's place for temporary files.

    Example:
        >>> folder = TemporaryFolder()
        >>> folder.path.is_dir()
        True
        >>> folder.close()
        >>> folder.path.exists()
        False
    """

    def __init__(self, parent: str | os.PathLike[str] | None = None) -> None:
        place = Path(parent) if parent is not None else Path(tempfile.gettempdir())
        place.mkdir(parents=True, exist_ok=True)
        sweep(place)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        self._remove = weakref.finalize(self, _remove, self.path, hold(self.path), os.getpid())

    def close(self) -> None:
        """Remove it with all that is in it. Safe to call twice."""
        self._remove()


def hold(folder: Path) -> FileLock | None:
    """Keep a folder from being swept, as long as the result and this process live; None if somebody else does so."""
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


def sweep(parent: Path) -> None:
    """Remove what killed processes left in a folder: theirs have a lock that nobody holds any more."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, Timeout):  # another user's, or in use
            if (folder / _LOCK).exists() and time.time() - folder.stat().st_mtime > _SETTLED:
                with FileLock(folder / _LOCK, timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)
                    _LOG.info("Removed %s, left behind by a process that was killed.", folder)


def _remove(folder: Path, lock: FileLock | None, owner: int) -> None:
    if os.getpid() != owner:  # a forked child that ends must not take its parent's folder along
        return
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        with contextlib.suppress(OSError):
            lock.release(force=True)
