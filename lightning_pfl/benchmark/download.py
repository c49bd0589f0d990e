"""One file from one address, resumed where it stopped and moved into place only when its digest is right."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

Report = Callable[[str, int, "int | None"], None]
"""Called with (label, bytes so far, bytes in all or None) while a download runs."""

_CHUNK = 1 << 18


class DigestError(OSError):
    """A file whose sha256 is not the pinned one."""


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes, as 64 hex characters."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def download(
    url: str,
    target: Path,
    *,
    sha256: str,
    headers: Mapping[str, str] | None = None,
    attempts: int = 4,
    timeout: float = 60.0,
    report: Report | None = None,
) -> None:
    """Fetch `url` into `target`; a partial file beside it (`.part`) is continued, by this call or a later one.

    Args:
        url: http, https or file address.
        target: where the finished file lies; it appears at once and whole, or not at all.
        sha256: digest that the file must have.
        headers: extra request headers, such as Authorization.
        attempts: how often a broken connection is taken up again.
        timeout: seconds without a byte after which a connection counts as broken.
        report: progress callback.

    Raises:
        DigestError: the bytes are not the pinned ones; the partial file is removed.
        urllib.error.URLError: the address cannot be reached or has no such file.
        ConnectionError: it broke off every time; what came is kept for a later call.
    """
    part = target.with_name(target.name + ".part")
    for attempt in range(attempts):
        try:
            _continue(url, part, dict(headers or {}), timeout, report)
            break
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the partial file is longer than the real one: start over
                part.unlink(missing_ok=True)
            if attempt + 1 == attempts or (error.code < 500 and error.code != 416):
                raise
        except (TimeoutError, ConnectionError, urllib.error.URLError) as error:
            refused = isinstance(error, urllib.error.URLError) and not isinstance(error.reason, TimeoutError)
            if attempt + 1 == attempts or refused:
                raise
            logger.warning("%s broke off (%s); continuing", url, error)
    found = sha256_of(part)
    if found != sha256:
        part.unlink()
        raise DigestError(f"{url} must have sha256 {sha256}, but has {found}. It was not kept.")
    os.replace(part, target)


def _continue(url: str, part: Path, headers: dict[str, str], timeout: float, report: Report | None) -> None:
    have = part.stat().st_size if part.exists() else 0
    if have and not url.startswith("file:"):
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        resumed = getattr(answer, "status", None) == 206
        have = have if resumed else 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with part.open("ab" if resumed else "wb") as sink:
            while chunk := _next(answer):
                sink.write(chunk)
                have += len(chunk)
                if report is not None:
                    report(part.name.removesuffix(".part"), have, total)
    if total is not None and have < total:
        raise ConnectionError(f"{have} of {total} bytes came")


def _next(answer: http.client.HTTPResponse) -> bytes:
    """The next bytes; an answer in chunks that breaks off is no OSError by itself."""
    try:
        return answer.read(_CHUNK)
    except http.client.HTTPException as error:
        raise ConnectionError(f"the answer broke off: {error!r}") from error
