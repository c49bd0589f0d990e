"""Packages and registries built on the spot: nothing here leaves the machine."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest


def _tar(files, *, mode="w:xz", extra=()):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in extra:
            archive.addfile(member)
    return buffer.getvalue()


def _ar_member(name, content):
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}".encode() + b"`\n"
    return header + content + b"\n" * (len(content) % 2)


@pytest.fixture
def make_deb():
    """Write a Debian package: `make_deb(path, files, extra=tar members)`; returns its digest."""

    def make(path: Path, files, extra=(), mode="w:xz", suffix="xz"):
        blob = (
            b"!<arch>\n"
            + _ar_member("debian-binary", b"2.0\n")
            + _ar_member("control.tar.xz", _tar({"./control": b"x"}))
        )
        blob += _ar_member(f"data.tar.{suffix}", _tar(files, mode=mode, extra=extra))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob)
        return hashlib.sha256(blob).hexdigest()

    return make


@pytest.fixture
def make_tgz():
    """Write an npm tarball: `make_tgz(path, files, extra=tar members)`; returns its digest."""

    def make(path: Path, files, extra=()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_tar(files, mode="w:gz", extra=extra))
        return hashlib.sha256(path.read_bytes()).hexdigest()

    return make


@pytest.fixture
def make_wheel():
    """Write a minimal wheel that pip accepts: `make_wheel(folder, name, version, files)`; returns path and digest."""

    def make(folder: Path, name: str, version: str, files):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}-{version}-py3-none-any.whl"
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(path, "w") as wheel:
            for member, content in files.items():
                wheel.writestr(member, content)
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
        return path, hashlib.sha256(path.read_bytes()).hexdigest()

    return make


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, with byte ranges; breaks off after `server.break_after` bytes of a file, once."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        start = 0
        if (asked := self.headers.get("Range")) and self.server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
        else:
            self.send_response(200)
        end, self.server.break_after = self.server.break_after, None
        if self.server.chunked and end is not None:  # one chunk is announced whole and comes in part
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n" % (len(content) - start) + content[start : start + end])
            return
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:] if end is None else content[start : start + end])


@pytest.fixture
def registry(tmp_path):
    """A web server on this machine for the folder `registry.root`; `registry.requests` lists what was asked."""
    root = tmp_path / "www"
    root.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=str(root)))
    server.requests, server.break_after, server.ranges, server.root = [], None, True, root
    server.chunked = False
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
