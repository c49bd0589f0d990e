"""Where published files lie: on this machine, in a bucket or anywhere else that fsspec reads.

Start at `as_path`. `ImageFinder` looks pictures up in the few folders that published paths may be relative to, by
listing each folder once: a bucket is asked once per folder and not once per picture.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias, final

from upath import UPath

__all__ = ["AnyPath", "ImageFinder", "as_path"]

AnyPath: TypeAlias = Path | UPath
"""Local paths are pathlib's own, others have the same methods."""


def as_path(location: str | os.PathLike[str] | UPath) -> AnyPath:
    """A path for a local name or an address such as ``s3://bucket/drake`` or ``memory://drake``.

    An address needs its file system's package (``s3fs`` for ``s3://``) and takes credentials as that package does; a
    ``UPath`` with options of its own is taken as it is.

    Raises:
        ValueError: no file system is installed for such an address.

    Example:
        >>> as_path("data/drake").name, as_path("memory://drake/train").parent.name
        ('drake', 'drake')
    """
    if isinstance(location, UPath) or "://" not in str(location):
        return location if isinstance(location, (Path, UPath)) else Path(location)
    try:
        return UPath(str(location))
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{location} cannot be read: {error}. Install the file system's package (s3fs for s3://, gcsfs for gs://), "
            "or copy the data to a local folder."
        ) from error


@final
class ImageFinder:
    """Finds pictures by the names that records give them.

    Args:
        places: folders that names may be relative to, the likeliest first.
    """

    def __init__(self, places: Sequence[AnyPath]) -> None:
        self.places = tuple(places)
        self._listings: dict[AnyPath, frozenset[str]] = {}

    def find(self, name: str) -> AnyPath | None:
        """The file, from the first place that has it; None if none has. A full address is looked up as it is."""
        if "://" in name:
            path = as_path(name)
            return path if path.is_file() else None
        for place in self.places:
            path = place / name
            if path.name in self._listing(path.parent):
                return path
        return None

    def _listing(self, folder: AnyPath) -> frozenset[str]:
        if folder not in self._listings:
            try:
                self._listings[folder] = frozenset(entry.name for entry in folder.iterdir())
            except (FileNotFoundError, NotADirectoryError):
                self._listings[folder] = frozenset()
        return self._listings[folder]
