"""`RankLimit`: a client that trains only the first few ranks of its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pfl.adapters import adapter_parameters
from lightning_pfl.callbacks.federated import Exchange
from lightning_pfl.types import Personalized, SharedTensors

__all__ = ["RankLimit"]


@final
class RankLimit(Exchange):
    """Cuts what a client receives to its first r_k ranks and trains no others, as if its adapters had that rank.

    Rows of A and Q, columns of B, and rows and columns of P from r_k on are zero and stay so, which is also how a
    server pads a smaller adapter. The scale stays alpha / r, memory and bytes are those of the full rank. It stands
    after `CoLoRA` and sends nothing of its own.

    Args:
        ranks: r_k by client id, 1 to CoLoRA's rank.

    Raises:
        ValueError: a rank below 1; in a client, no rank for it.

    Source:
        HETLoRA, Cho et al., EMNLP 2024, arXiv:2401.06432: truncation and zero-padding.

    Example:
        >>> RankLimit({"ward-3": 4, "ward-7": 16}).ranks["ward-3"]
        4
    """

    def __init__(self, ranks: Mapping[str, int]) -> None:
        if low := {client: rank for client, rank in ranks.items() if rank < 1}:
            raise ValueError(f"A client's rank must be at least 1, but is {low}.")
        self.ranks = dict(ranks)

    @override
    def architecture(self, module: L.LightningModule) -> str:
        """The same for all."""
        return "ranks"

    @override
    def upload(self, module: L.LightningModule) -> SharedTensors:
        """Nothing of its own."""
        return SharedTensors()

    @override
    def receive(self, module: L.LightningModule, personalized: Personalized) -> None:
        """Cut what `CoLoRA` has received by now; on the driver, which is no client, nothing."""
        try:
            client = getattr(module.trainer.strategy, "client_id", None)
        except RuntimeError:  # what Lightning raises for a module that no Trainer has
            client = None
        if client is not None:
            self._cut(module, client)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._cut(pl_module, trainer.strategy.client_id)  # type: ignore[attr-defined]

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer, *_: Any
    ) -> None:
        rank = self._rank(trainer.strategy.client_id)  # type: ignore[attr-defined]
        for letter, parameter in _letters(pl_module):
            if parameter.grad is not None:
                _beyond(parameter.grad, letter, rank)

    @torch.no_grad()
    def _cut(self, module: L.LightningModule, client: str) -> None:
        rank = self._rank(client)
        for letter, parameter in _letters(module):
            _beyond(parameter, letter, rank)

    def _rank(self, client: str) -> int:
        if client not in self.ranks:
            raise ValueError(f"Client `{client}` has no rank; `RankLimit` has those of {sorted(self.ranks)}.")
        return self.ranks[client]


def _letters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    adapters = adapter_parameters(module)
    return [(name.split(".colora_")[-1][0], p) for name, p in {**adapters.pq, **adapters.ab}.items()]


def _beyond(tensor: Tensor, letter: str, rank: int) -> None:
    """Zero what lies beyond a rank, in place."""
    if letter in "APQ":
        tensor[rank:] = 0.0
    if letter in "BP":
        tensor[:, rank:] = 0.0
