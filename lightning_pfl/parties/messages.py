"""What parties and server write to each other: a manifest (JSON), its signature, and tensors (safetensors).

Start at `Update` and `Mixture`. `to_files` gives the files of a message, unsigned; `Update.of` and `Mixture.of` read
them back, once `mailbox` has checked who signed them. The manifest names the digest of the tensors, so that signing
the one signs both, and ``previous``, the digest of the last manifest from the server that the writer knew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lightning_pfl.documents import FIT_FOR_A_PATH, SHA256, Schema
from lightning_pfl.types import ClientUpdate, FlatTensors, Personalized, SharedTensors

__all__ = ["MIXTURE", "UPDATE", "Base", "Mixture", "Update"]

UPDATE, MIXTURE = "update", "mixture"
_PARTS = ("common", "same_architecture")
_ID = {"type": "string", "pattern": FIT_FOR_A_PATH}
_TEXT = {"type": "string", "maxLength": 1000}
_COMMON: dict[str, Any] = {
    "format": {"const": 1},
    "run": _ID,
    "party": _ID,
    "round": {"type": "integer", "minimum": 0, "maximum": 10**9},
    "previous": SHA256,
    "tensors": {
        "type": "object",
        "required": ["sha256", "nbytes"],
        "additionalProperties": False,
        "properties": {"sha256": SHA256, "nbytes": {"type": "integer", "minimum": 0, "maximum": 2**50}},
    },
}


def _schema(kind: str, what: str, properties: Mapping[str, Any]) -> Schema:
    all_of_it = {**_COMMON, "kind": {"const": what}, **properties}
    return Schema(
        kind, {"type": "object", "required": list(all_of_it), "additionalProperties": False, "properties": all_of_it}
    )


_BASE = {
    "type": "object",
    "required": ["identity", "name_or_path", "aligned", "ranks"],
    "additionalProperties": False,
    "properties": {
        "identity": _TEXT,
        "name_or_path": {"anyOf": [_TEXT, {"type": "null"}]},
        "aligned": {"type": "boolean"},
        "ranks": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 1}},
    },
}
SCHEMAS = {
    UPDATE: _schema(
        "An update's manifest",
        UPDATE,
        {
            "num_examples": {"type": "integer", "minimum": 1, "maximum": 2**60},
            "architecture": _TEXT,
            "base": {"anyOf": [_BASE, {"type": "null"}]},
        },
    ),
    MIXTURE: _schema(
        "A mixture's manifest",
        MIXTURE,
        {
            "update": {"anyOf": [SHA256, {"type": "null"}]},
            "parts": {"type": "array", "items": {"enum": ["frozen", "start"]}, "uniqueItems": True},
            "notes": {"type": "array", "items": {"type": "string"}},
        },
    ),
}
"""By kind of message, what its manifest must look like."""


@final
@dataclass(frozen=True)
class Base:
    """Which base model an update's adapters stand on.

    Attributes:
        identity: `CoLoraConfig.base_identity`.
        name_or_path: what the base model is called, if that is known.
        aligned: whether its bases come from an alignment; all parties' or none's must.
        ranks: rank by ``tower/block/role`` of the layers whose P and Q are exchanged.
    """

    identity: str
    name_or_path: str | None
    aligned: bool
    ranks: Mapping[str, int]

    def as_json(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return {
            "identity": self.identity,
            "name_or_path": self.name_or_path,
            "aligned": self.aligned,
            "ranks": dict(self.ranks),
        }


@final
@dataclass(frozen=True, eq=False)
class Update:
    """What a party sends.

    Attributes:
        run: name of the run.
        previous: digest of the server's last manifest to this party, or the roster's digest at the beginning.
        content: the update itself; metrics stay at home.
        base: what the adapters stand on; None: not known to who wrote it.
    """

    run: str
    previous: str
    content: ClientUpdate
    base: Base | None = None

    def to_files(self) -> tuple[dict[str, Any], bytes]:
        """The manifest, all but its ``tensors`` entry, and the tensors."""
        update = self.content
        tensors = _named(update.shared, "")
        if update.sketch is not None:
            tensors["sketch"] = update.sketch.contiguous()
        manifest = {
            "format": 1,
            "kind": UPDATE,
            "run": self.run,
            "party": update.client_id,
            "round": update.round,
            "previous": self.previous,
            "num_examples": update.num_examples,
            "architecture": update.architecture,
            "base": None if self.base is None else self.base.as_json(),
        }
        return manifest, save(tensors)

    @staticmethod
    def of(manifest: Mapping[str, Any], tensors: bytes, where: str) -> Update:
        """Undo `to_files`.

        Raises:
            ValueError: the tensors are not what an update holds.
        """
        held = _loaded(tensors, where)
        sketch = held.pop("sketch", None)
        base = manifest["base"]
        return Update(
            run=manifest["run"],
            previous=manifest["previous"],
            content=ClientUpdate(
                client_id=manifest["party"],
                round=manifest["round"],
                num_examples=manifest["num_examples"],
                architecture=manifest["architecture"],
                shared=_taken(held, "", where),
                sketch=sketch,
            ),
            base=None if base is None else Base(**base),
        )


@final
@dataclass(frozen=True, eq=False)
class Mixture:
    """What the server sends to one party.

    Attributes:
        run: name of the run.
        party: for whom.
        round: of the updates that were mixed.
        previous: digest of the server's last manifest to this party, or the roster's digest at the beginning.
        update: digest of the manifest of this party's update that counted; None: none did.
        content: the mixture itself.
        notes: what the party's log should say, such as why its update did not count.
    """

    run: str
    party: str
    round: int
    previous: str
    update: str | None
    content: Personalized
    notes: tuple[str, ...] = ()

    def to_files(self) -> tuple[dict[str, Any], bytes]:
        """The manifest, all but its ``tensors`` entry, and the tensors."""
        parts = {"frozen": self.content.frozen, "start": self.content.start}
        present = {name: part for name, part in parts.items() if part is not None}
        tensors: dict[str, Tensor] = {}
        for name, part in present.items():
            tensors |= _named(part, f"{name}/")
        manifest = {
            "format": 1,
            "kind": MIXTURE,
            "run": self.run,
            "party": self.party,
            "round": self.round,
            "previous": self.previous,
            "update": self.update,
            "parts": sorted(present),
            "notes": list(self.notes),
        }
        return manifest, save(tensors)

    @staticmethod
    def of(manifest: Mapping[str, Any], tensors: bytes, where: str) -> Mixture:
        """Undo `to_files`.

        Raises:
            ValueError: the tensors are not what a mixture holds.
        """
        held = _loaded(tensors, where)
        parts = {name: _taken(held, f"{name}/", where, rest=True) for name in manifest["parts"]}
        _refuse_rest(held, where)
        return Mixture(
            run=manifest["run"],
            party=manifest["party"],
            round=manifest["round"],
            previous=manifest["previous"],
            update=manifest["update"],
            content=Personalized(parts.get("frozen"), parts.get("start")),
            notes=tuple(manifest["notes"]),
        )


def as_text(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as the file holds it, the same bytes for equal manifests."""
    return json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n"


def _named(shared: SharedTensors, prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}{part}/{name}": tensor.clone()  # one mixture may go into both branches, and files share no memory
        for part in _PARTS
        for name, tensor in getattr(shared, part).unpack().items()
    }


def _loaded(tensors: bytes, where: str) -> dict[str, Tensor]:
    try:
        held: dict[str, Tensor] = load(tensors)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # KeyError: a dtype that torch lacks
        raise ValueError(
            f"`{where}` must hold tensors in the safetensors format, but does not: {error!s:.300}."
        ) from None
    for name, tensor in held.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"All tensors in `{where}` must be float32, but `{name}` is {tensor.dtype}.")
    return held


def _taken(held: dict[str, Tensor], prefix: str, where: str, *, rest: bool = False) -> SharedTensors:
    """Take the tensors of one `SharedTensors` out of what was loaded."""
    flats = {}
    for part in _PARTS:
        start = f"{prefix}{part}/"
        names = [name for name in held if name.startswith(start)]
        flats[part] = FlatTensors.pack({name.removeprefix(start): held.pop(name) for name in names})
    if not rest:
        _refuse_rest(held, where)
    return SharedTensors(**flats)


def _refuse_rest(held: Mapping[str, Tensor], where: str) -> None:
    if held:
        raise ValueError(f"`{where}` holds tensors that belong to no part of the message: {sorted(held)[:4]}.")
