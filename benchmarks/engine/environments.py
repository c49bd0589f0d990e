"""Environments of the peers, each of its own under ``build/benchmarks``, made when they are first needed.

They pin what they import (Flower another Ray than ours), so nothing of theirs may be installed beside this package.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from benchmarks.engine.measure import ROOT

__all__ = ["PEERS", "InstallError", "environment"]

PEERS = {
    "pfl": ("pfl[pytorch]==0.6.0",),
    "flower": ("flwr[simulation]==1.42.0",),
}
"""What is installed where, beside the torch of ``constraints.txt``."""


class InstallError(Exception):
    """An environment could not be made; the message is pip's."""


def environment(peer: str) -> Path:
    """The interpreter of a peer's environment.

    Args:
        peer: of `PEERS`.

    Raises:
        InstallError: pip cannot install it.
    """
    folder = ROOT / "build" / "benchmarks" / peer
    python, done = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join((_torch(), *PEERS[peer]))
    if done.exists() and done.read_text() == wanted:
        return python
    _call(sys.executable, "-m", "venv", str(folder))
    _call(str(python), "-m", "pip", "install", "--quiet", _torch())  # first: an open range may bring CUDA along
    _call(str(python), "-m", "pip", "install", "--quiet", *PEERS[peer])
    done.write_text(wanted)
    return python


def _torch() -> str:
    found = re.search(r"^torch==.+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found.group()


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InstallError((done.stderr or done.stdout).strip()[-1000:])
