"""Which layers can hold an adapter, and what they are as matrices.

Start at `adaptable`. A convolution is a linear map of patches (`lightning_pfl.functional.patches`), so it is adapted
like a linear layer, whatever the size of its kernel, as long as it is one matrix for the whole patch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TypeGuard

from torch import nn

from lightning_pfl.adapters._compat import BaseTunerLayer, Conv1D
from lightning_pfl.functional.patches import Patches

__all__ = ["Convolution", "adaptable", "features", "is_convolution", "obstacle", "patches_of"]

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def adaptable(module: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """All layers that can hold an adapter, by name, and those of their kind that cannot, with the reason.

    Example:
        >>> layers, skipped = adaptable(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.MultiheadAttention(4, 2)))
        >>> list(layers), skipped
        (['0'], {'2.out_proj': "torch's MultiheadAttention reads its weight without calling the layer"})
    """
    named = Counter(id(child) for _, child in _all_children(module))
    layers: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    hidden: str | None = None  # what lies under this name is a layer's inside; it comes right after the layer
    for name, child in module.named_modules():
        if hidden is not None and name.startswith(hidden):
            continue
        if isinstance(child, BaseTunerLayer):
            hidden = f"{name}."
            base = child.get_base_layer()
            if getattr(child, "is_colora", False):
                layers[name] = base
            else:
                skipped[name] = f"it already holds an adapter of another PEFT method ({type(child).__name__})"
        elif isinstance(child, nn.MultiheadAttention):
            hidden = f"{name}."
            skipped[f"{name}.out_proj"] = "torch's MultiheadAttention reads its weight without calling the layer"
        elif (reason := obstacle(child)) is not None:
            skipped[name] = reason
        elif (isinstance(child, (nn.Linear, Conv1D)) or is_convolution(child)) and name:
            if named[id(child)] > 1:
                skipped[name] = "it stands in several places of the model, and an adapter would come into one of them"
            else:
                layers[name] = child
    return layers, skipped


def features(layer: nn.Module) -> tuple[int, int]:
    """Columns and rows of a layer's weight as a matrix (torch's Linear and convolutions, transformers' Conv1D).

    Example:
        >>> features(nn.Linear(4, 3)), features(nn.Conv2d(4, 3, kernel_size=5))
        ((4, 3), (100, 3))
    """
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if is_convolution(layer):
        return layer.in_channels * math.prod(layer.kernel_size), layer.out_channels
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight.shape[0], weight.shape[1]


def is_convolution(layer: nn.Module) -> TypeGuard[Convolution]:
    """Whether a layer is a convolution in one to three dimensions (not a transposed one).

    Example:
        >>> is_convolution(nn.Conv2d(3, 8, 3)), is_convolution(nn.Linear(3, 8))
        (True, False)
    """
    return isinstance(layer, _KINDS)


def obstacle(layer: nn.Module) -> str | None:
    """Why a convolution cannot hold an adapter; None if it can, or if the layer is no convolution.

    Example:
        >>> obstacle(nn.Conv2d(8, 8, 3, padding=1)) is None
        True
        >>> obstacle(nn.Conv2d(8, 8, 3, groups=8))
        'a convolution in groups of channels: a matrix for each, which one update of low rank would mix'
    """
    if isinstance(layer, _TRANSPOSED):
        return "a transposed convolution, which is no map of patches of its input"
    if not is_convolution(layer):
        return None
    if layer.groups > 1:
        return "a convolution in groups of channels: a matrix for each, which one update of low rank would mix"
    if isinstance(layer.weight, nn.UninitializedParameter):
        return "it is lazy: its width is not known before the first forward"
    kind = next(kind for kind in _KINDS if isinstance(layer, kind))
    if type(layer).forward is not kind.forward:
        return f"{type(layer).__name__} has a forward of its own, so which patches it reads is not known"
    return None


def patches_of(layer: nn.Module) -> Patches | None:
    """The patches that a convolution reads; None for a linear layer.

    Example:
        >>> patches_of(nn.Conv1d(4, 4, 3, padding="same"))
        Patches(kernel=(3,), stride=(1,), padding=((1, 1),), dilation=(1,), padding_mode='zeros')
    """
    if not is_convolution(layer):
        return None
    padding: list[tuple[int, int]]
    if isinstance(layer.padding, str):  # "valid" or "same", which puts what is left over at the end
        spans = [gap * (size - 1) for size, gap in zip(layer.kernel_size, layer.dilation, strict=True)]
        padding = [(0, 0) if layer.padding == "valid" else (span // 2, span - span // 2) for span in spans]
    else:
        padding = [(width, width) for width in layer.padding]
    return Patches(
        tuple(layer.kernel_size), tuple(layer.stride), tuple(padding), tuple(layer.dilation), layer.padding_mode
    )


def _all_children(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Every pair of a module and a child of its own, each module visited once."""
    for parent in module.modules():
        for child in parent._modules.values():
            if child is not None:
                yield parent, child
