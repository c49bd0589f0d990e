"""A second adapter in every adapted layer, for methods whose clients train one to exchange and one to keep.

Start at `add_shared_adapter`. From then on the adapter called `SHARED` is the one that a client sends and starts anew
from (`exchanged`); the one that was there is the client's own. Which of them a forward pass sees is said by `show`. A
global branch stays with the client's own adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from lightning_pfl.adapters.injection import ADAPTER, SHARED, adapted_layers, config_of
from lightning_pfl.adapters.layer import CoLoraLayer

__all__ = ["add_shared_adapter", "exchanged", "show", "shown", "shows"]


def add_shared_adapter(module: nn.Module) -> None:
    """Give every adapted layer a second adapter that starts as the first one did; a second time does nothing.

    It has the first one's rank, scale, bases and starting values, no global branch, and is trained. A forward pass
    sees the first one alone until `show` says otherwise.

    Raises:
        ValueError: the module holds no Co-LoRA adapters.

    Example:
        >>> from lightning_pfl.adapters import CoLoraConfig, inject
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1))
        >>> add_shared_adapter(mlp)
        >>> [name for name, _ in mlp[0].named_parameters() if "colora_B" in name]
        ['colora_B.default', 'colora_B.shared']
    """
    config = replace(config_of(module), global_branch=False)
    for name, layer in adapted_layers(module):
        if SHARED in layer.colora_address:
            continue
        layer.update_layer(SHARED, name, config)
        assert layer.colora_address[SHARED] == layer.colora_address[ADAPTER], "both have one placement"
        tensors = layer.state_of(ADAPTER)
        with torch.no_grad():
            for attribute, tensor in layer.state_of(SHARED).items():
                tensor.copy_(tensors[attribute])
        for tensor in layer.local_tensors(SHARED).values():
            tensor.requires_grad_(True)


def exchanged(layer: CoLoraLayer) -> str:
    """Which of a layer's adapters a client sends and starts anew from: the second one, where there is one.

    Example:
        >>> from lightning_pfl.adapters import CoLoraConfig, inject
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1))
        >>> exchanged(mlp[0])
        'default'
    """
    return SHARED if SHARED in layer.colora_address else ADAPTER


def show(module: nn.Module, *names: str) -> None:
    """Choose the adapters whose outputs every adapted layer adds up.

    Unlike PEFT's ``set_adapter`` it leaves alone what is trained.

    Args:
        module: a module with adapters.
        names: `ADAPTER`, `SHARED` or both.
    """
    for _, layer in adapted_layers(module):
        layer._active_adapter = list(names)  # type: ignore[assignment]  # PEFT takes one name or several


def shown(module: nn.Module) -> tuple[str, ...]:
    """The adapters that a forward pass sees.

    Raises:
        ValueError: the module holds no Co-LoRA adapters.
    """
    config_of(module)
    return next(tuple(layer.active_adapters) for _, layer in adapted_layers(module))


@contextmanager
def shows(module: nn.Module, *names: str) -> Iterator[None]:
    """`show` for a while, then what was shown before.

    Example:
        >>> from lightning_pfl.adapters import CoLoraConfig, inject
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1))
        >>> add_shared_adapter(mlp)
        >>> with shows(mlp, SHARED):
        ...     inside = shown(mlp)
        >>> inside, shown(mlp)
        (('shared',), ('default',))
    """
    before = shown(module)
    show(module, *names)
    try:
        yield
    finally:
        show(module, *before)
