"""`Fingerprint`: what must be equal for a checkpoint to fit a model. Rank, layers, and the frozen base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import lightning as L

from lightning_pfl.callbacks.federated import Exchange
from lightning_pfl.federation.frozen import checksums

__all__ = ["Fingerprint"]


@dataclass(frozen=True)
class Fingerprint:
    """A model, as far as clients' states and shared tensors depend on it.

    Attributes:
        architecture: as in `ClientUpdate`.
        shared: digest of names and shapes of what it shares; changes with the rank.
        parameters: digest of names and shapes of all its parameters.
        base: digest of its big frozen tensors' contents.
    """

    architecture: str
    shared: str
    parameters: str
    base: str

    @staticmethod
    def of(module: L.LightningModule, exchange: Exchange) -> Fingerprint:
        """Look at a model with its layers built and its adapters in place."""
        upload = exchange.upload(module)
        layouts = [(part.layout.names, part.layout.shapes) for part in (upload.common, upload.same_architecture)]
        parameters = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
        shared = {name for names, _ in layouts for name in names}
        frozen = {name: value for name, value in checksums(module).items() if name not in shared}
        return Fingerprint(exchange.architecture(module), _digest(layouts), _digest(parameters), _digest(frozen))

    def difference(self, other: Fingerprint) -> str | None:
        """What differs, in words; None if nothing does.

        Example:
            >>> mine = Fingerprint("a", "b", "c", "d")
            >>> mine.difference(Fingerprint("a", "b", "c", "e"))
            'its frozen weights (another base model)'
        """
        if self.shared != other.shared or self.architecture != other.architecture:
            return "what it shares (another rank, other adapted layers, or another architecture)"
        if self.parameters != other.parameters:
            return "the names or shapes of its parameters"
        return "its frozen weights (another base model)" if self.base != other.base else None

    def dump(self) -> dict[str, str]:
        """Plain containers, for a checkpoint."""
        return asdict(self)

    @staticmethod
    def load(entry: Mapping[str, str]) -> Fingerprint:
        """Undo `dump`."""
        return Fingerprint(**entry)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
