"""Where this machine's own configuration says that packages come from.

Start at `npm_registry` and `debian_mirrors`; pip needs nothing here, because `pip download` reads its own
configuration. No host name stands in this project: a machine that names none gets an error that says how to name one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit


class RegistryNotConfiguredError(LookupError):
    """The machine names no registry of the kind that a package needs."""


@dataclass(frozen=True)
class NpmRegistry:
    """Address of an npm registry, without a trailing slash, and the bearer token for it, if any."""

    url: str
    token: str | None = None


def npm_registry(package: str, *, environ: Mapping[str, str] | None = None) -> NpmRegistry:
    """Find the npm registry for `package`: environment, then `.npmrc` files, then what an installed npm says.

    Args:
        package: its name; a scope ("@scope/name") may have a registry of its own in `.npmrc`.
        environ: environment variables; the process's own by default.

    Raises:
        RegistryNotConfiguredError: none is named anywhere and npm is not installed.

    Example:
        >>> npm_registry("left-pad", environ={"npm_config_registry": "http://localhost:4873/"}).url
        'http://localhost:4873'
    """
    env = os.environ if environ is None else environ
    settings: dict[str, str] = {}
    for path in (
        Path(env.get("HOME", "")) / ".npmrc",
        Path(env.get("NPM_CONFIG_USERCONFIG", "/nonexistent")),
        Path(".npmrc"),
    ):
        if path.is_file():
            settings |= dict(_npmrc(path.read_text(encoding="utf8"), env))
    scope = package.split("/")[0] if package.startswith("@") else ""
    url = (
        settings.get(f"{scope}:registry")
        or env.get("npm_config_registry")
        or env.get("NPM_CONFIG_REGISTRY")
        or settings.get("registry")
        or (_ask_npm() if environ is None else None)
    )
    if not url:
        raise RegistryNotConfiguredError(
            f"No npm registry is configured, and {package} comes from one. Set npm_config_registry=<address of a "
            "registry>, or write `registry=<address>` into ~/.npmrc, or install npm, which brings a default."
        )
    url = url.rstrip("/")
    place = url.split(":", 1)[1]
    return NpmRegistry(url, settings.get(f"{place}/:_authToken"))


def debian_mirrors(*, environ: Mapping[str, str] | None = None, etc: Path = Path("/etc/apt")) -> tuple[str, ...]:
    """List the addresses of Debian mirrors, best guess first: `$LIGHTNING_PFL_DEBIAN_MIRROR`, then apt's sources.

    Reads one-line sources (`*.list`) and deb822 ones (`*.sources`); disabled, source-only and non-HTTP entries are left
    out. Only the addresses matter here: a pinned package is found by its path in the mirror's pool, which holds the
    versions of every supported suite.

    Raises:
        RegistryNotConfiguredError: no mirror is named.
    """
    env = os.environ if environ is None else environ
    found = env.get("LIGHTNING_PFL_DEBIAN_MIRROR", "").split()
    if not found:
        files = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
        for path in files:
            if path.suffix == ".list" and path.is_file():
                found += _one_line_sources(path.read_text(encoding="utf8"))
            elif path.suffix == ".sources" and path.is_file():
                found += _deb822_sources(path.read_text(encoding="utf8"))
    mirrors = tuple(
        dict.fromkeys(url.rstrip("/") for url in found if urlsplit(url).scheme in {"http", "https", "file"})
    )
    if not mirrors:
        raise RegistryNotConfiguredError(
            f"No Debian mirror is configured under {etc}. Set LIGHTNING_PFL_DEBIAN_MIRROR=<address of a Debian "
            "mirror>, the folder that holds `pool` and `dists`; nothing is installed from it and no root is needed."
        )
    return mirrors


def _one_line_sources(text: str) -> Iterator[str]:
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[[^\]]*\]\s+)?(\S+)", line)
        if match:
            yield match[1]


def _deb822_sources(text: str) -> Iterator[str]:
    for stanza in re.split(r"\n\s*\n", re.sub(r"(?m)^#.*\n?", "", text)):
        fields = {
            key.lower(): " ".join(value.split())
            for key, value in re.findall(r"(?m)^([\w-]+):((?:.*)(?:\n[ \t].*)*)", stanza)
        }
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() not in {"no", "false"}:
            yield from fields.get("uris", "").split()


def _npmrc(text: str, env: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        if "=" in line and not line.lstrip().startswith(("#", ";")):
            key, value = line.split("=", 1)
            value = re.sub(r"\$\{(\w+)\}", lambda name: env.get(name[1], ""), value.strip().strip("\"'"))
            yield key.strip(), value


def _ask_npm() -> str | None:
    program = shutil.which("npm")
    if program is None:
        return None
    asked = subprocess.run(
        [program, "config", "get", "registry"], capture_output=True, text=True, timeout=60, check=False
    )
    answer = asked.stdout.strip()
    return answer if answer.startswith(("http:", "https:")) else None
