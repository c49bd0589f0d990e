"""Files that a reader sees whole or not at all, whatever happens to the writer.

Start at `write_whole`. On a local disk the bytes go to a file of another name in the same folder, to the disk itself,
and only then under their name; a crash leaves what was there before. Object stores show an object when it is whole.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

__all__ = ["write_whole"]


def write_whole(files: Any, path: str, data: bytes, *, lasting: bool = True, private: bool = False) -> None:
    """Write a file, over one of that name if there is one.

    Args:
        files: an fsspec file system.
        path: in it; folders are made.
        data: all of it.
        lasting: whether the bytes must be on the disk when this returns, and not just on their way.
        private: whether only this user may read it, on a local disk.

    Raises:
        OSError: no room, no permission. What was there before is still there.
    """
    folder = path.rsplit("/", 1)[0]
    files.makedirs(folder, exist_ok=True)
    if not _is_local(files):
        files.pipe_file(path, data)
        return
    unfinished = Path(f"{path}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        if private:
            os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        with open(unfinished, "wb") as stream:
            stream.write(data)
            if lasting:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    if lasting and hasattr(os, "O_DIRECTORY"):  # the name must last, too
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _is_local(files: Any) -> bool:
    protocol = files.protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)
