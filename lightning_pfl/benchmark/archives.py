"""Wheels, npm tarballs and Debian packages, read in Python: no root, no dpkg, no npm.

Start at `unpack`. It writes only regular files, only inside the target folder and only those asked for: links and
devices are left out, a member that points outside is an error. Which archive to read is told by the file name's end.
"""

from __future__ import annotations

import fnmatch
import importlib
import io
import logging
import lzma
import re
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

logger = logging.getLogger(__name__)


_DAMAGED = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(ValueError, IndexError, OverflowError),  # what the readers make of damaged numbers and names
    *(NotImplementedError, RuntimeError),  # zipfile: a method of packing that it lacks, a password
)


class ArchiveError(ValueError):
    """An archive that is damaged, of an unknown kind, or that points outside its folder."""


def unpack(archive: Path, folder: Path, *, members: Sequence[str] = ("*",)) -> int:
    """Write the regular files of `archive` that match any of the `members` patterns below `folder`.

    Args:
        archive: a `.whl`/`.zip`, `.tgz`/`.tar.*` or `.deb` file.
        folder: target; made when missing. Files keep their path inside the archive.
        members: shell patterns over the path inside the archive, without a leading "./"; "*" crosses "/".

    Returns:
        The number of files written.

    Raises:
        ArchiveError: a damaged archive, an unknown kind, a member outside `folder`, or no member that matches.

    Example:
        >>> import tempfile, zipfile
        >>> with tempfile.TemporaryDirectory() as where:
        ...     with zipfile.ZipFile(Path(where) / "a.whl", "w") as wheel:
        ...         wheel.writestr("data/x.txt", "hello")
        ...         wheel.writestr("code.py", "")
        ...     unpack(Path(where) / "a.whl", Path(where) / "out", members=["data/*"])
        1
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if archive.suffix in {".whl", ".zip"}:
            written = _unpack_zip(archive, folder, members)
        elif archive.suffix == ".deb":
            with open_deb(archive) as data:
                written = _unpack_tar(data, folder, members)
        elif archive.suffix == ".tgz" or ".tar" in archive.suffixes:
            with tarfile.open(archive) as data:
                written = _unpack_tar(data, folder, members)
        else:
            raise ArchiveError(f"{archive.name} must end in .whl, .zip, .tgz, .tar.* or .deb to be unpacked.")
    except ArchiveError:
        raise
    except _DAMAGED as error:
        raise ArchiveError(f"{archive} cannot be read as an archive: {error}. Delete it to fetch it again.") from error
    if not written:
        raise ArchiveError(f"{archive} holds no file that matches {list(members)}.")
    return written


def open_deb(path: Path) -> tarfile.TarFile:
    """Open the data part of a Debian package (an `ar` archive of three members) as a tar file.

    Raises:
        ArchiveError: not a Debian package, or a zstd one where no zstd decoder is installed.

    Source:
        deb(5): "!<arch>" then debian-binary, control.tar.*, data.tar.* with 60-byte headers, even-aligned.
    """
    for name, content in _ar_members(path):
        if name.startswith("data.tar"):
            if name.endswith(".zst"):
                return tarfile.open(fileobj=io.BytesIO(_unzstd(content, path)))
            return tarfile.open(fileobj=io.BytesIO(content))
    raise ArchiveError(f"{path} has no data.tar member; it is not a Debian package.")


def _ar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as stream:
        if stream.read(8) != b"!<arch>\n":
            raise ArchiveError(f"{path} must start with '!<arch>', as every .deb does. Delete it to fetch it again.")
        while header := stream.read(60):
            if len(header) < 60 or header[58:] != b"`\n":
                raise ArchiveError(f"{path} has a damaged ar header. Delete it to fetch it again.")
            name = header[:16].decode("ascii", "replace").strip().rstrip("/")
            if not header[48:58].strip().isdigit():
                raise ArchiveError(f"{path} has a damaged ar header. Delete it to fetch it again.")
            size = int(header[48:58])
            content = stream.read(size)
            if len(content) < size:
                raise ArchiveError(f"{path} ends inside {name}. Delete it to fetch it again.")
            stream.read(size % 2)
            yield name, content


def _unzstd(content: bytes, path: Path) -> bytes:
    """Decode zstd with whatever this Python or machine has: the standard library has it from 3.14 on only."""
    for module in ("compression.zstd", "backports.zstd"):
        try:
            return bytes(importlib.import_module(module).decompress(content))
        except ImportError:
            continue
    try:
        return bytes(importlib.import_module("zstandard").ZstdDecompressor().decompressobj().decompress(content))
    except ImportError:
        pass
    if program := shutil.which("zstd"):
        return subprocess.run([program, "-dc"], input=content, stdout=subprocess.PIPE, check=True).stdout
    raise ArchiveError(f"{path} is packed with zstd, which Python 3.11 cannot read: `pip install zstandard`.")


def _unpack_tar(archive: tarfile.TarFile, folder: Path, members: Sequence[str]) -> int:
    written = links = 0
    for member in archive:
        name = member.name.removeprefix("./")
        if not _wanted(name, members):
            continue
        if not member.isfile():
            links += not member.isdir()
            continue
        if not _is_inside(name):
            raise ArchiveError(f"{folder.name} would hold {member.name!r}, which lies outside its folder.")
        archive.extract(member, folder, set_attrs=False, filter="data")
        written += 1
    if links:
        logger.info("%s: %d links were left out", folder.name, links)
    return written


def _unpack_zip(path: Path, folder: Path, members: Sequence[str]) -> int:
    written = 0
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("/") or not _wanted(name, members):
                continue
            if not _is_inside(name):
                raise ArchiveError(f"{path} holds {name!r}, which lies outside its folder.")
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, target.open("wb") as sink:
                _copy(source, sink)
            written += 1
    return written


def _is_inside(name: str) -> bool:
    """Whether a member's name stays in the folder, on any system: no root, no drive, no climbing."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return bool(parts) and not re.match("[A-Za-z]:", parts[0]) and not {"/", "//", ".."} & set(parts)


def _copy(source: IO[bytes], sink: IO[bytes]) -> None:
    shutil.copyfileobj(source, sink, 1 << 20)


def _wanted(name: str, members: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in members)
