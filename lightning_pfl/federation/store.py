"""`ClientStore`: the clients' private states between their turns, in memory while they fit, then on disk or elsewhere.

A state is bytes to the store. It never travels to other clients and takes no part in aggregation; no more does a
client's secret, from which its noise is made. What a checkpoint of the run needs of the store is its `state_dict`.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any, final

import torch

from lightning_pfl.errors import CheckpointMismatchError
from lightning_pfl.federation.blobs import Blobs

__all__ = ["ClientStore"]

_FIT_FOR_A_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@final
class ClientStore:
    r"""Keeps one state per client.

    Every state is a version of its own, named by its sha256: a write never touches an older one, and a read checks
    that it gets what was written. A version is removed when a newer one of its client arrives, but only if this object
    wrote it and no `state_dict` refers to it: a checkpoint that is kept, of this run or of one before it, finds every
    state that it names.

    Args:
        url: where states go that do not fit into memory, and all states when a checkpoint is made: a folder, or any
            URL that fsspec knows. Checkpoints then hold names instead of states. None: a temporary folder, and
            checkpoints hold the states themselves.
        max_memory: how many bytes of states to keep in memory. The default is small, so that a thousand clients fit
            into a laptop: writing a state to the disk and reading it back takes some milliseconds per megabyte.

    Attributes:
        blobs: the files; what else a run keeps out of memory lies there too.

    Raises:
        ValueError: `max_memory` is negative.

    Example:
        >>> store = ClientStore(max_memory=10)
        >>> store.put("ward-3", b"8 bytes.")
        >>> store.put("ward-7", b"on disk, as memory is full")
        >>> store.get("ward-7")
        b'on disk, as memory is full'
        >>> store.ids(), store.nbytes_in_memory
        (['ward-3', 'ward-7'], 8)
        >>> store.close()
    """

    def __init__(self, url: str | os.PathLike[str] | None = None, *, max_memory: int = 32 * 2**20) -> None:
        if max_memory < 0:
            raise ValueError(f"`max_memory` is a number of bytes, but is {max_memory}.")
        self.blobs = Blobs(None if url is None else os.fspath(url))
        self._max_memory = max_memory
        self._memory: dict[str, bytes] = {}  # by client
        self._versions: dict[str, str] = {}  # the current one, by client
        self._own: set[tuple[str, str]] = set()  # written here, so that no checkpoint of another process needs them
        self._referred: set[tuple[str, str]] = set()
        self._staged: dict[str, str] = {}  # versions that may come to nothing, by client
        self._held: dict[str, bytes] = {}  # those of them that are in memory
        self._secrets: dict[str, bytes] = {}  # by client
        self._nbytes = 0

    @property
    def nbytes_in_memory(self) -> int:
        """Bytes of the states in memory."""
        return self._nbytes

    def ids(self) -> list[str]:
        """Whose states there are, sorted."""
        return sorted(self._versions)

    def put(self, client_id: str, state: bytes) -> None:
        """Keep a client's state; what it had before is gone, unless a checkpoint refers to it.

        Raises:
            ValueError: an id that is not fit for a path.
            OSError: it fits neither into memory nor on the disk. The client then keeps its former state.
        """
        self.put_all([(client_id, state)])

    def put_all(self, states: Iterable[tuple[str, bytes]]) -> None:
        """Keep states of several clients, all of them or none.

        Args:
            states: at most one per client; read one by one, so that not all need be in memory.

        Raises:
            ValueError: an id that is not fit for a path.
            OSError: one fits neither into memory nor on the disk. All clients then keep their former states.
        """
        names = []
        try:
            for client_id, state in states:
                names.append(client_id)  # first, as staging may fail halfway
                self.stage(client_id, state)
            self.accept(names)
        finally:
            self.drop(names)

    def stage(self, client_id: str, state: bytes) -> None:
        """Hold a state of which it is not known yet whether it counts; the client's own stays what it is.

        It lies where it would lie afterwards: in memory, where what is staged may take as much again as what counts,
        or as a version among the files. It is no part of a `state_dict`.

        Raises:
            ValueError: an id that is not fit for a path.
            OSError: it fits neither into memory nor on the disk.
        """
        _check_id(client_id)
        self.drop([client_id])
        version = hashlib.sha256(state).hexdigest()
        self._staged[client_id] = version
        if sum(map(len, self._held.values())) + len(state) <= self._max_memory:
            self._held[client_id] = state
        else:
            self._write(client_id, version, state)

    def staged(self) -> list[str]:
        """Whose states are staged, sorted."""
        return sorted(self._staged)

    def accept(self, client_ids: Iterable[str]) -> None:
        """Staged states of these clients take the place of their former ones, all of them or none.

        Raises:
            OSError: one fits neither into memory nor on the disk. All clients then keep their former states.
        """
        names = [client_id for client_id in client_ids if client_id in self._staged]
        kept: dict[str, bytes] = {}
        written: list[tuple[str, str]] = []
        nbytes = self._nbytes
        try:
            for client_id in names:
                nbytes -= len(self._memory.get(client_id, b""))
                state = self._held.get(client_id)
                if state is not None and nbytes + len(state) <= self._max_memory:
                    kept[client_id], nbytes = state, nbytes + len(state)
                elif state is not None and self._write(client_id, self._staged[client_id], state):
                    written.append((client_id, self._staged[client_id]))  # others stay: the newest is needed last
        except BaseException:
            for one in written:
                self._remove(*one)
            raise
        for client_id in names:
            old, version = self._versions.get(client_id), self._staged.pop(client_id)
            self._held.pop(client_id, None)
            self._memory.pop(client_id, None)
            if client_id in kept:
                self._memory[client_id] = kept[client_id]
            self._versions[client_id] = version
            if old is not None and old != version:
                self._remove(client_id, old)
        self._nbytes = nbytes

    def drop(self, client_ids: Iterable[str] | None = None) -> None:
        """Forget staged states: of these clients, or all of them. Who has none is passed over."""
        for client_id in self.staged() if client_ids is None else client_ids:
            version = self._staged.pop(client_id, None)
            self._held.pop(client_id, None)
            if version is not None and version != self._versions.get(client_id):
                self._remove(client_id, version)

    def get(self, client_id: str) -> bytes | None:
        """A client's state; None if it has none yet.

        Raises:
            CheckpointMismatchError: what the store holds is damaged or gone.
        """
        if client_id in self._memory:
            return self._memory[client_id]
        if client_id not in self._versions:
            return None
        version = self._versions[client_id]
        return self.blobs.read(_key(client_id, version), version, _what(client_id))

    def secret(self, client_id: str) -> bytes:
        """32 random bytes that only this client has, drawn when they are first asked for and kept with its states.

        A store with a URL keeps them there and checkpoints do not hold them; else checkpoints do.
        """
        if client_id not in self._secrets:
            kept = None if self.blobs.url is None else self._kept_secret(client_id)
            self._keep_secret(client_id, secrets.token_bytes(32) if kept is None else kept)
        return self._secrets[client_id]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to hold: the states as uint8 tensors, or where they lie if the store has a URL.

        Loads with ``weights_only=True``.
        """
        if self.blobs.url is None:
            states = {client_id: _as_tensor(self.get(client_id) or b"") for client_id in self.ids()}
            if not self._secrets:
                return {"states": states}
            return {"states": states, "secrets": {one: _as_tensor(key) for one, key in sorted(self._secrets.items())}}
        for client_id, state in self._memory.items():
            self._write(client_id, self._versions[client_id], state)
        self._referred.update(self._versions.items())
        return {"url": self.blobs.url, "versions": dict(self._versions)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go back to the states of a checkpoint.

        Args:
            state_dict: from `state_dict`. A store with a URL takes over the states that a checkpoint holds itself.
                Where it holds names, the files are looked for under this store's URL, so a store may have moved.

        Raises:
            CheckpointMismatchError: the checkpoint's states lie in a store, and this one has no URL or lacks some.
        """
        if "states" in state_dict:
            self._clear()
            for client_id, state in state_dict["states"].items():
                self.put(client_id, state.numpy().tobytes())
            for client_id, secret in state_dict.get("secrets", {}).items():
                self._keep_secret(client_id, secret.numpy().tobytes())
            return
        if self.blobs.url is None:
            raise CheckpointMismatchError(
                f"The checkpoint's client states lie in the store {state_dict['url']}, but this run's store has no "
                f"URL. Pass `store=ClientStore({state_dict['url']!r})` to the strategy."
            )
        missing = [
            client_id
            for client_id, version in state_dict["versions"].items()
            if not self.blobs.exists(_key(client_id, version))
        ]
        if missing:
            raise CheckpointMismatchError(
                f"The checkpoint refers to states of {len(state_dict['versions'])} clients, but the store "
                f"{self.blobs.url} lacks those of {missing[:5]}{' and others' if len(missing) > 5 else ''}. Was it "
                "moved or cleaned? Give the store the URL where they lie."
            )
        self._clear()
        self._versions = dict(state_dict["versions"])
        self._referred.update(self._versions.items())

    def release(self, states: Iterable[tuple[str, str]]) -> None:
        """Let go of versions that a removed checkpoint referred to.

        Args:
            states: client ids and versions to which no checkpoint refers any more. Those that clients still have stay.
        """
        for client_id, version in states:
            self._referred.discard((client_id, version))
            if self._versions.get(client_id) != version:
                self._remove(client_id, version)

    def close(self) -> None:
        """Forget everything in memory and remove the temporary folder; what lies under a URL stays."""
        self._clear()
        self.blobs.close()

    def _clear(self) -> None:
        self.drop()
        self._memory.clear()
        self._versions.clear()
        self._secrets.clear()
        self._nbytes = 0

    def _kept_secret(self, client_id: str) -> bytes | None:
        return self.blobs.read_any(_key(client_id, "secret"))

    def _keep_secret(self, client_id: str, secret: bytes) -> None:
        self._secrets[client_id] = secret
        if self.blobs.url is not None and self._kept_secret(client_id) != secret:
            self.blobs.write(_key(client_id, "secret"), secret, f"the secret of client `{client_id}`", private=True)

    def _write(self, client_id: str, version: str, state: bytes) -> bool:
        """Write a version unless it is there; whether it was not."""
        if new := self.blobs.write(_key(client_id, version), state, _what(client_id)):
            self._own.add((client_id, version))
        return new

    def _remove(self, client_id: str, version: str) -> None:
        if (client_id, version) in self._own and (client_id, version) not in self._referred:
            self._own.discard((client_id, version))
            self.blobs.remove(_key(client_id, version))


def _key(client_id: str, version: str) -> str:
    return f"{client_id}/{version}.state"


def _what(client_id: str) -> str:
    return f"the state of client `{client_id}`"


def _check_id(client_id: str) -> None:
    if not _FIT_FOR_A_PATH.fullmatch(client_id) or client_id.endswith("."):
        raise ValueError(
            f"A client's id names a folder of the store, so it must consist of 1 to 128 letters, digits, `.`, `_` "
            f"and `-`, start with a letter or a digit and not end with a dot, but is {client_id!r}."
        )


def _as_tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8) if state else torch.zeros(0, dtype=torch.uint8)
