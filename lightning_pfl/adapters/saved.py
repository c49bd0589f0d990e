"""Read and write the adapters in a saved ``state_dict`` by their exchange names, without the module it belongs to.

Start at `shared_in`: what `shared_tensors` would copy from the module. A party that exchanges files has a checkpoint at
hand and no module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_pfl.adapters.config import CoLoraConfig
from lightning_pfl.adapters.injection import ADAPTER
from lightning_pfl.types import FlatTensors, SharedTensors

__all__ = ["is_aligned", "shared_in", "with_global", "with_local"]


def shared_in(state: Mapping[str, Any], config: CoLoraConfig) -> SharedTensors:
    """What a client trained and may share, float32 copies.

    Args:
        state: of a module with adapters.
        config: of the adapters, resolved.

    Raises:
        ValueError: the state lacks a tensor of the adapters.

    Example:
        >>> from torch import nn
        >>> from lightning_pfl.adapters import config_of, inject
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1))
        >>> shared_in(mlp.state_dict(), config_of(mlp)).common.layout.names
        ('main/0/linear/P', 'main/0/linear/Q')
    """
    common: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    for is_common, name, key in _names(config, "colora_"):
        (common if is_common else own)[name] = _held(state, key)
    return SharedTensors(FlatTensors.pack(common), FlatTensors.pack(own))


def with_global(state: Mapping[str, Any], config: CoLoraConfig, shared: SharedTensors) -> dict[str, Any]:
    """The state with other values in the frozen global branch G; a name that is absent keeps its value.

    Raises:
        ValueError: a name that the adapters do not have, or another shape than there.
    """
    return _with(state, config, shared, "colora_global_")


def with_local(state: Mapping[str, Any], config: CoLoraConfig, shared: SharedTensors) -> dict[str, Any]:
    """The state with other values in the local branch L; a name that is absent keeps its value.

    Raises:
        ValueError: as `with_global`.
    """
    return _with(state, config, shared, "colora_")


def is_aligned(state: Mapping[str, Any], config: CoLoraConfig) -> bool:
    """Whether the adapters' frozen bases come from an alignment."""
    flags = [state.get(f"{name}.colora_aligned.{ADAPTER}") for name, address in _placement(config) if address]
    return any(isinstance(flag, Tensor) and bool(flag.any()) for flag in flags)


def _with(state: Mapping[str, Any], config: CoLoraConfig, shared: SharedTensors, prefix: str) -> dict[str, Any]:
    keys = {(is_common, name): key for is_common, name, key in _names(config, prefix)}
    result = dict(state)
    for is_common, flat in ((True, shared.common), (False, shared.same_architecture)):
        for name, value in flat.unpack().items():
            if (is_common, name) not in keys:
                raise ValueError(
                    f"The server sent `{name}`, which these adapters do not have. They have "
                    f"{sorted(known for _, known in keys)[:8]}. Parties that exchange P and Q need the same num_blocks "
                    "and roles."
                )
            key = keys[is_common, name]
            before = _held(state, key)
            if before.shape != value.shape:
                raise ValueError(
                    f"`{name}` must have the shape {tuple(before.shape)} that it has in this checkpoint, but came as "
                    f"{tuple(value.shape)}. Ranks (and, for A and B, widths) must agree."
                )
            result[key] = value.to(before.dtype).clone()
    return result


def _names(config: CoLoraConfig, prefix: str) -> Iterator[tuple[bool, str, str]]:
    """Per tensor: whether it is for every client, its exchange name, and its key in a state."""
    for layer, address in _placement(config):
        for letter in "AB" if address is None else "PQ":
            name = f"{layer}.{letter}" if address is None else f"{address}/{letter}"
            yield address is not None, name, f"{layer}.{prefix}{letter}.{ADAPTER}"


def _placement(config: CoLoraConfig) -> list[tuple[str, str | None]]:
    if config.placement is None:
        raise ValueError("The config does not say where its adapters are: its `placement` is None.")
    return list(config.placement.items())


def _held(state: Mapping[str, Any], key: str) -> Tensor:
    held = state.get(key)
    if not isinstance(held, Tensor):
        what = "nothing" if held is None else f"a {type(held).__name__}"
        raise ValueError(f"The checkpoint must hold the adapters' tensor `{key}`, but has {what} of that name.")
    return held
