"""What travels to actors through the object store: snapshots to all of them, tensor files to other machines only."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, final

from lightning_pfl.federation.pools import cluster
from lightning_pfl.federation.snapshot import Snapshot
from lightning_pfl.federation.tensor_file import TensorFileRef

__all__ = ["Parcels"]

_LOG = logging.getLogger(__name__)
_PIECE = 64 * 2**20  # bytes of a tensor file in one object


@final
class Parcels:
    """What a run's actors are sent.

    Args:
        snapshots: by name, what turns start from.

    Attributes:
        snapshots: by name, references in the object store.
        receivers: nodes that were sent a tensor file, and may hold a copy.
    """

    def __init__(self, snapshots: Mapping[str, Snapshot]) -> None:
        self._originals = dict(snapshots)
        files = [snapshot.file for snapshot in snapshots.values() if snapshot.file is not None]
        self._files = {file.path: file for file in sorted(files, key=lambda file: file.nbytes)}  # per path the longest
        self._pieces: dict[str, list[Any]] = {}
        self.snapshots: dict[str, Any] = {name: cluster.put(snapshot) for name, snapshot in snapshots.items()}
        self.receivers: set[str] = set()

    def put_again(self) -> None:
        """Put everything into the object store anew, which has lost some of it."""
        self._pieces.clear()
        self.snapshots.update((name, cluster.put(snapshot)) for name, snapshot in self._originals.items())

    def file(self, path: str, node: str) -> tuple[TensorFileRef, list[Any]]:
        """A tensor file for a node, as references to its pieces, which all machines share.

        Args:
            path: where it lies here.
            node: who will receive it.
        """
        file = self._files[path]
        if path not in self._pieces:
            _LOG.info("Ray: sending %.0f MiB of tensors to other machines.", file.nbytes / 2**20)
            with open(path, "rb") as stream:
                self._pieces[path] = [
                    cluster.put(stream.read(min(_PIECE, file.nbytes - start)))
                    for start in range(0, file.nbytes, _PIECE)
                ]
        self.receivers.add(node)
        return file, self._pieces[path]
