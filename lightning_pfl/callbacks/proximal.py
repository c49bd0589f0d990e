"""`Proximal`: holds a client's trained adapter near where its turn began."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pfl.adapters import adapter_parameters

__all__ = ["Proximal", "pull"]


@final
class Proximal(L.Callback):
    r"""Adds :math:`\frac{\mu}{2} \lVert w - w^t \rVert^2` to a client's loss, w^t the adapters w as a turn began.

    The term is added as its gradient, before gradients are clipped and once per optimizer step, so that it does not
    depend on how many batches a step accumulates. What is logged is the user's own loss. Gates and other trained
    parameters, which the server never sees, are not held.

    Args:
        strength: mu, >= 0.

    Raises:
        ValueError: a negative strength; in a fit, a module without adapters.

    Source:
        FedProx, Li et al., MLSys 2020, arXiv:1812.06127, equation 2.

    Example:
        >>> trainer = L.Trainer(callbacks=[Proximal(0.01)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, strength: float) -> None:
        if not strength >= 0:
            raise ValueError(f"The `strength` of a proximal pull must be at least 0, but is {strength}.")
        self.strength = strength
        self._anchors: Mapping[str, Tensor] = {}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._anchors = {name: p.detach().clone() for name, p in _held(pl_module).items()}

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer, *_: Any
    ) -> None:
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        held = {name: p for name, p in _held(pl_module).items() if id(p) in mine}
        pull(held, self._anchors, self.strength)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._anchors = {}


@torch.no_grad()
def pull(parameters: Mapping[str, nn.Parameter], anchors: Mapping[str, Tensor], strength: float) -> None:
    r"""Add :math:`\mu (w - w^t)` to gradients, in place; a parameter without a gradient is not trained now.

    Args:
        parameters: w, by name.
        anchors: w^t, by the same names.
        strength: mu.

    Example:
        >>> w = nn.Parameter(torch.tensor([3.0]))
        >>> w.grad = torch.tensor([1.0])
        >>> pull({"w": w}, {"w": torch.tensor([1.0])}, 0.5)
        >>> w.grad
        tensor([2.])
    """
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            parameter.grad.add_(parameter - anchors[name].to(parameter.device), alpha=strength)


def _held(module: L.LightningModule) -> dict[str, nn.Parameter]:
    adapters = adapter_parameters(module)
    return {**adapters.pq, **adapters.ab}
