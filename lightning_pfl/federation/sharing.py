"""What clients share: the tensors of callbacks that are an `Exchange`, and tensors that the user allows by name.

Start at `exchange_of`, which makes one `Exchange` of all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import final

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_pfl.callbacks.federated import Exchange
from lightning_pfl.types import FlatTensors, Layout, Personalized, SharedTensors

__all__ = ["JointExchange", "NamedTensors", "exchange_of", "nothing_shared"]


def exchange_of(callbacks: Iterable[L.Callback], share: Sequence[str]) -> Exchange:
    """The one `Exchange` of a run.

    Args:
        callbacks: of the Trainer.
        share: as in `FederatedStrategy`.

    Raises:
        ValueError: nothing is shared.
    """
    parts = [callback for callback in callbacks if isinstance(callback, Exchange)]
    if share:
        parts.append(NamedTensors(share))
    if not parts:
        raise nothing_shared()
    return parts[0] if len(parts) == 1 else JointExchange(parts)


def nothing_shared() -> ValueError:
    """The error for a run in which clients would have nothing to tell each other."""
    return ValueError(
        "Clients share nothing: there is no callback that exchanges tensors and `share=` is empty. Add "
        "`CoLoRA(...)` to `Trainer(callbacks=...)`, or name the tensors to share, for example "
        "`FederatedStrategy(share=['encoder'])`."
    )


@final
class NamedTensors(Exchange):
    """Shares the tensors of a module's ``state_dict`` that an allow-list names.

    They go to every client, so they must have one shape in all models that have them.

    Args:
        share: names as in ``state_dict``, names of submodules (all tensors below), or patterns with ``*``.

    Raises:
        TypeError: a single string instead of a sequence of them.

    Example:
        >>> module = L.LightningModule()
        >>> module.encoder, module.head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
        >>> NamedTensors(["encoder", "head.b*"]).upload(module).common.layout.names
        ('encoder.bias', 'encoder.weight', 'head.bias')
    """

    def __init__(self, share: Sequence[str]) -> None:
        if isinstance(share, str):
            raise TypeError(f"`share` must be a sequence of names, but is one string. Write `share=[{share!r}]`.")
        self.share = tuple(share)

    @override
    def prepare_server(self, module: L.LightningModule, *, global_branch: bool) -> None:
        """Check that names match and that the server's rule can do something with plain tensors.

        Raises:
            ValueError: the rule sends a frozen global adapter, which plain tensors cannot hold beside themselves.
        """
        self._tensors(module)
        if global_branch:
            raise ValueError(
                "The aggregator sends each client a frozen global adapter beside its own, but tensors shared by name "
                "(`share=`) have room for one value only. Use `FedAvg()`, or an aggregator with `global_branch=False`."
            )

    @override
    def architecture(self, module: L.LightningModule) -> str:
        """Equal for modules whose trainable tensors have equal names and shapes."""
        shapes = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
        return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16]

    @override
    def upload(self, module: L.LightningModule) -> SharedTensors:
        """Copy the tensors."""
        return SharedTensors(common=FlatTensors.pack(self._tensors(module)))

    @override
    def receive(self, module: L.LightningModule, personalized: Personalized) -> None:
        """Overwrite the tensors."""
        if personalized.start is None:
            return
        mine = self._tensors(module)
        with torch.no_grad():
            for name, value in personalized.start.common.unpack().items():
                if name not in mine or mine[name].shape != value.shape:
                    has = tuple(mine[name].shape) if name in mine else "nothing of that name"
                    raise ValueError(
                        f"The server sent `{name}` of shape {tuple(value.shape)}, but this client has {has}. "
                        "Share only tensors that have one shape in all models (`share=`)."
                    )
                mine[name].copy_(value)

    def _tensors(self, module: L.LightningModule) -> dict[str, Tensor]:
        everything = {name: value for name, value in module.state_dict(keep_vars=True).items() if _can_mix(value)}
        chosen: dict[str, Tensor] = {}
        for wanted in self.share:
            found = {name: value for name, value in everything.items() if _matches(name, wanted)}
            if not found:
                raise ValueError(
                    f"`share` names {wanted!r}, but no floating-point tensor of {type(module).__name__} matches. There "
                    f"are {sorted(everything)[:20]}{' and more' if len(everything) > 20 else ''}."
                )
            chosen.update(found)
        return chosen


def _can_mix(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _matches(name: str, wanted: str) -> bool:
    return name == wanted or name.startswith(f"{wanted}.") or fnmatchcase(name, wanted)


@final
class JointExchange(Exchange):
    """Several exchanges as one; each receives the names that it sends.

    Args:
        parts: at least one.

    Raises:
        ValueError: on upload, if two of them share a tensor of one name.
    """

    def __init__(self, parts: Sequence[Exchange]) -> None:
        self.parts = tuple(parts)

    @override
    def prepare_server(self, module: L.LightningModule, *, global_branch: bool) -> None:
        """Prepare each."""
        for part in self.parts:
            part.prepare_server(module, global_branch=global_branch)

    @override
    def architecture(self, module: L.LightningModule) -> str:
        """Equal where all agree."""
        return "+".join(part.architecture(module) for part in self.parts)

    @override
    def upload(self, module: L.LightningModule) -> SharedTensors:
        """All tensors of all parts."""
        uploads = [part.upload(module) for part in self.parts]
        return SharedTensors(
            common=_union([upload.common for upload in uploads]),
            same_architecture=_union([upload.same_architecture for upload in uploads]),
        )

    @override
    def receive(self, module: L.LightningModule, personalized: Personalized) -> None:
        """Hand each part what is its own."""
        for part in self.parts:
            if part.prefix is None:
                mine = part.upload(module)
                frozen, start = _only(personalized.frozen, mine), _only(personalized.start, mine)
            else:
                frozen, start = (_begun(sent, part.prefix) for sent in (personalized.frozen, personalized.start))
            part.receive(module, Personalized(frozen=frozen, start=start))


def _union(flats: Sequence[FlatTensors]) -> FlatTensors:
    tensors: dict[str, Tensor] = {}
    for flat in flats:
        twice = tensors.keys() & flat.layout.names
        if twice:
            raise ValueError(f"Two exchanges share tensors of one name: {sorted(twice)[:5]}. Leave them out of one.")
        tensors.update(flat.unpack())
    return FlatTensors.pack(tensors)


def _only(sent: SharedTensors | None, mine: SharedTensors) -> SharedTensors | None:
    if sent is None:
        return None
    return SharedTensors(
        common=_select(sent.common, mine.common.layout),
        same_architecture=_select(sent.same_architecture, mine.same_architecture.layout),
    )


def _begun(sent: SharedTensors | None, prefix: str) -> SharedTensors | None:
    """Those tensors whose names begin so."""
    if sent is None:
        return None
    flats = (sent.common, sent.same_architecture)
    return SharedTensors(
        *(FlatTensors.pack({n: value for n, value in flat.unpack().items() if n.startswith(prefix)}) for flat in flats)
    )


def _select(flat: FlatTensors, layout: Layout) -> FlatTensors:
    tensors: Mapping[str, Tensor] = flat.unpack()
    return FlatTensors.pack({name: tensors[name] for name in layout.names if name in tensors})
