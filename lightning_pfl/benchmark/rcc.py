"""Reader of Qt's binary resource files (`.rcc`), in which GCompris keeps its pictures; Qt is not needed.

Source: the format as Qt's `rcc` writes it: a header ("qres", version, then offsets of tree, data and names, big
endian), a tree of 14-byte nodes (22 from version 2 on, which adds a time stamp), names in UTF-16, data with a length
before it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_FOLDER, _ZLIB = 2, 1


def read_rcc(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (path inside the archive, content) for every file, in the archive's order.

    Raises:
        ValueError: not an rcc file, a damaged one, or one packed in a way other than zlib; names that climb.
    """
    blob = path.read_bytes()
    if blob[:4] != b"qres":
        raise ValueError(f"{path} must start with 'qres', as a Qt resource file does.")
    try:
        yield from _walk(blob, path)
    except (struct.error, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: its tables point outside it ({error}).") from error


def _walk(blob: bytes, path: Path) -> Iterator[tuple[str, bytes]]:
    version, tree, data, names = struct.unpack_from(">4I", blob, 4)
    node_size = 22 if version >= 2 else 14
    seen: set[int] = set()

    def name_at(offset: int) -> str:
        (length,) = struct.unpack_from(">H", blob, names + offset)
        start = names + offset + 6  # two bytes of length, four of hash
        name = blob[start : start + 2 * length].decode("utf-16-be")
        if name in {"", ".", ".."} or any(character in name for character in "/\\:\0"):
            raise ValueError(f"{path} names a file {name!r}, which is no name of one.")
        return name

    waiting = [(0, "")]
    while waiting:
        index, prefix = waiting.pop()
        if index in seen:
            raise ValueError(f"{path} is damaged: its node {index} lies in two folders.")
        seen.add(index)
        node = tree + index * node_size
        name_offset, flags = struct.unpack_from(">IH", blob, node)
        here = prefix + name_at(name_offset) if index else ""
        if flags & _FOLDER:
            count, first = struct.unpack_from(">II", blob, node + 6)
            if (first + count) * node_size > len(blob):
                raise ValueError(f"{path} is damaged: a folder in it has {count} files from node {first} on.")
            waiting += [(child, here + "/" if here else "") for child in reversed(range(first, first + count))]
            continue
        if flags & ~(_FOLDER | _ZLIB):
            raise ValueError(f"{path}: {here} is packed in an unknown way (flags {flags}).")
        (offset,) = struct.unpack_from(">I", blob, node + 10)
        (size,) = struct.unpack_from(">I", blob, data + offset)
        content = blob[data + offset + 4 : data + offset + 4 + size]
        yield here, zlib.decompress(content[4:]) if flags & _ZLIB else content
