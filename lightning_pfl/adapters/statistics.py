"""Running statistics of normalisation layers, which are frozen together with the weights around them.

A batch normalisation moves its mean and variance in every training forward, whether its parameters are trained or not.
Around adapters that would train a part of the base model in secret: it is no part of an adapter, so an adapter that was
saved, sent or merged would meet other statistics than it was trained with. `hold` keeps such layers in evaluation mode
for as long as their own parameters are frozen.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_pfl.adapters._compat import forward_pre_hooks

__all__ = ["hold", "release"]


def hold(module: nn.Module) -> list[str]:
    """Keep running statistics as they are wherever a layer's own parameters are frozen; again does nothing.

    Args:
        module: any; layers without running statistics are left alone. ``train()`` may be called on it as ever.

    Returns:
        Names of the layers.

    Example:
        >>> import torch
        >>> layer = nn.BatchNorm1d(2).requires_grad_(False)
        >>> hold(layer)
        ['']
        >>> _ = layer.train()(torch.randn(8, 2))
        >>> layer.running_mean
        tensor([0., 0.])
    """
    held = [(name, child) for name, child in module.named_modules() if _has_statistics(child)]
    for _, child in held:
        if _stay not in forward_pre_hooks(child).values():
            child.register_forward_pre_hook(_stay)
    return [name for name, _ in held]


def release(module: nn.Module) -> None:
    """Undo `hold`."""
    for child in module.modules():
        hooks = forward_pre_hooks(child)
        for key in [key for key, hook in hooks.items() if hook is _stay]:
            del hooks[key]


def _has_statistics(child: nn.Module) -> bool:
    return getattr(child, "running_mean", None) is not None and not any(
        parameter.requires_grad for parameter in child.parameters(recurse=False)
    )


def _stay(module: nn.Module, _: Any) -> None:
    """Before each forward, since ``train()`` reaches every layer: back into evaluation mode if nothing is trained."""
    if module.training and _has_statistics(module):
        module.eval()
