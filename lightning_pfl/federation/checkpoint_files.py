"""`CheckpointFiles`: how a run's checkpoints are written and read, so that none is half there or silently damaged.

A checkpoint is an ordinary ``torch.save`` file whose zip comment holds the sha256 of the rest: Lightning and
``torch.load`` read it as they read any other. torch itself does not notice flipped bits.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

import fsspec
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from lightning_pfl.errors import CheckpointMismatchError
from lightning_pfl.federation.whole_files import write_whole

if TYPE_CHECKING:
    from lightning_pfl.federation.store import ClientStore

__all__ = ["CheckpointFiles"]

_LOG = logging.getLogger(__name__)
_MARK = b"sha256:"
_COMMENT = len(_MARK) + 64
_NO_COMMENT = b"\0\0"  # the last two bytes of a zip file are the length of its comment


@final
class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and reads none that has changed since.

    Args:
        store: of the run; versions in it that only a removed checkpoint refers to are removed too.

    Example:
        >>> import tempfile
        >>> path = f"{tempfile.mkdtemp()}/last.ckpt"
        >>> CheckpointFiles().save_checkpoint({"epoch": 3}, path)
        >>> CheckpointFiles().load_checkpoint(path)
        {'epoch': 3}
    """

    def __init__(self, store: ClientStore | None = None) -> None:
        super().__init__()
        self._store = store
        self._refers: dict[str, frozenset[tuple[str, str]]] = {}  # by path, states that a checkpoint of ours needs

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint over what has its name.

        Raises:
            TypeError: ``storage_options``, which mean nothing here.
            OSError: it cannot be written. What had its name before is still there.
        """
        if storage_options is not None:
            raise TypeError("`storage_options` mean nothing here. Put them into fsspec's configuration.")
        stream = io.BytesIO()
        torch.save(checkpoint, stream)
        data = stream.getvalue()
        assert data.endswith(_NO_COMMENT), "torch.save writes a zip file without a comment"
        comment = _MARK + hashlib.sha256(data).hexdigest().encode()
        files, place = fsspec.core.url_to_fs(os.fspath(path))
        try:
            write_whole(files, place, data[:-2] + len(comment).to_bytes(2, "little") + comment)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write a checkpoint of {len(data)} bytes: {error.strerror or error}. The run ends here; the "
                "checkpoint before is untouched: make room, and resume from it",
                os.fspath(path),
            ) from error
        versions = checkpoint.get("federated", {}).get("store", {}).get("versions", {})
        before, self._refers[_name(path)] = self._refers.get(_name(path), frozenset()), frozenset(versions.items())
        self._release(before)

    @override
    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: of the file.
            map_location: as in ``torch.load``; None: the CPU.
            weights_only: as in ``torch.load``; None: True, as a checkpoint from elsewhere must not run code.

        Raises:
            FileNotFoundError: there is none.
            CheckpointMismatchError: it is damaged, or no checkpoint at all.
        """
        files, place = fsspec.core.url_to_fs(os.fspath(path))
        if not files.exists(place):
            raise FileNotFoundError(f"There is no checkpoint {path}.")
        data: bytes = files.cat_file(place)
        _verify(data, path)
        try:
            loaded = torch.load(
                io.BytesIO(data),
                map_location="cpu" if map_location is None else map_location,
                weights_only=True if weights_only is None else weights_only,
            )
        except Exception as error:
            raise CheckpointMismatchError(_unreadable(data, path, error)) from error
        if not isinstance(loaded, dict):
            raise CheckpointMismatchError(f"{path} is no checkpoint: it holds a {type(loaded).__name__}.")
        return loaded

    @override
    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, and the clients' states that no other one refers to."""
        super().remove_checkpoint(path)
        self._release(self._refers.pop(_name(path), frozenset()))

    def _release(self, states: frozenset[tuple[str, str]]) -> None:
        if self._store is not None and states:
            self._store.release(states.difference(*self._refers.values()))


def _name(path: Any) -> str:
    return os.path.normpath(str(path))


def _verify(data: bytes, path: Any) -> None:
    comment = data[-_COMMENT:]
    if not comment.startswith(_MARK):
        if data.startswith(b"PK") and data.endswith(_NO_COMMENT):
            _LOG.warning("%s has no digest, so whether it is damaged cannot be told.", path)
            return
        raise CheckpointMismatchError(
            f"{path} is truncated, or no checkpoint at all: it has {len(data)} bytes and does not end as one does. "
            "Resume from an earlier checkpoint."
        )
    found = hashlib.sha256(data[: -_COMMENT - 2] + _NO_COMMENT).hexdigest()
    if (wanted := comment[len(_MARK) :].decode("ascii", "replace")) != found:
        raise CheckpointMismatchError(
            f"{path} is damaged: it must have the sha256 {wanted[:12]}..., but has {found[:12]}... Resume from an "
            "earlier checkpoint."
        )


def _unreadable(data: bytes, path: Any, error: Exception) -> str:
    why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{path} ({len(data)} bytes) cannot be read as a checkpoint: {why} A checkpoint of this package consists of "
        "tensors, numbers, strings and containers; anything else might run code and is not loaded. Allow a type with "
        "`torch.serialization.add_safe_globals`, or resume from another checkpoint."
    )
