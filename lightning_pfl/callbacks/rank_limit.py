"""`RankLimit`: a client that trains only the first few ranks of its adapters, and gives up those that it does not need.

The last ranks of an adapter, its tail, are rows of A and Q, columns of B, and rows and columns of P. How much a tail
does is measured by what bounds the norm of its part of the product: :math:`\\lVert B_t \\rVert \\lVert A_t \\rVert` in
a conventional layer, the norm of the tail of P and Q in a Co-LoRA layer, whose bases are orthonormal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pfl.adapters.injection import ADAPTER, SHARED, adapted_layers
from lightning_pfl.callbacks.federated import AdapterUser, Exchange
from lightning_pfl.callbacks.turns import steps_of_turn
from lightning_pfl.types import Personalized, SharedTensors

__all__ = ["RankLimit"]

_RANK = "colora_rank"  # a buffer of the module, so that it is where the client's state is


@final
class RankLimit(AdapterUser, Exchange):
    r"""Cuts what a client receives to its first r_k ranks and trains no others, as if its adapters had that rank.

    What is beyond r_k is zero and stays so, which is also how a server pads a smaller adapter. The scale stays alpha /
    r, memory and bytes are those of the full rank. It stands after `CoLoRA` and sends nothing of its own.

    With a ``decay`` below 1 clients prune themselves: the tail from :math:`r' = \lfloor \gamma r_k \rfloor` on is
    penalised while they train, by :math:`\lambda` times its size, and given up at a turn's end if it has become smaller
    in that turn; from then on the client's rank is r'.

    Args:
        ranks: r_k by client id, 1 to CoLoRA's rank: where clients begin.
        decay: gamma, in (0, 1]; 1: ranks stay.
        penalty: lambda, >= 0.

    Raises:
        ValueError: a rank below 1, a number out of range; in a client, no rank for it.

    Source:
        HETLoRA, Cho et al., EMNLP 2024, arXiv:2401.06432: truncation, zero-padding, rank self-pruning.

    Example:
        >>> RankLimit({"ward-3": 4, "ward-7": 16}).ranks["ward-3"]
        4
    """

    def __init__(self, ranks: Mapping[str, int], *, decay: float = 1.0, penalty: float = 0.0) -> None:
        if low := {client: rank for client, rank in ranks.items() if rank < 1}:
            raise ValueError(f"A client's rank must be at least 1, but is {low}.")
        if not 0 < decay <= 1 or not penalty >= 0:
            raise ValueError(
                "`decay` is the share of its ranks that a client keeps, above 0 and at most 1, and `penalty` must not "
                f"be negative, but they are {decay} and {penalty}."
            )
        self.ranks = dict(ranks)
        self.decay = decay
        self.penalty = penalty
        self._size = 0.0
        self._last_step = 0

    @override
    def adapters_ready(self, module: L.LightningModule) -> None:
        if not hasattr(module, _RANK):
            module.register_buffer(_RANK, torch.tensor(0))  # 0: as `ranks` says

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
            _cut(module, self._rank(module, client))

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rank = self._rank(pl_module, trainer.strategy.client_id)  # type: ignore[attr-defined]
        _cut(pl_module, rank)
        self._size = _size(pl_module, self._kept(rank))
        self._last_step = trainer.global_step + steps_of_turn(trainer)

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer, *_: Any
    ) -> None:
        rank = self._rank(pl_module, trainer.strategy.client_id)  # type: ignore[attr-defined]
        if self.penalty and self._kept(rank) < rank:
            _add_penalty(pl_module, self._kept(rank), self.penalty)
        for tensors in _layers(pl_module):
            for letter, tensor in tensors.items():
                if tensor.grad is not None:
                    for part in _tail(tensor.grad, letter, rank):
                        part.zero_()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rank = self._rank(pl_module, trainer.strategy.client_id)  # type: ignore[attr-defined]
        if trainer.global_step < self._last_step or self._kept(rank) == rank:
            return
        if _size(pl_module, self._kept(rank)) < self._size:
            pl_module.get_buffer(_RANK).fill_(self._kept(rank))
            _cut(pl_module, self._kept(rank))

    def _rank(self, module: nn.Module, client: str) -> int:
        if client not in self.ranks:
            raise ValueError(f"Client `{client}` has no rank; `RankLimit` has those of {sorted(self.ranks)}.")
        return int(module.get_buffer(_RANK)) or self.ranks[client]

    def _kept(self, rank: int) -> int:
        """How many ranks would be left."""
        return max(1, int(self.decay * rank))


def _layers(module: nn.Module) -> list[dict[str, Tensor]]:
    """Per layer and adapter the trained tensors, by their letters."""
    return [
        layer.local_tensors(adapter)
        for _, layer in adapted_layers(module)
        for adapter in (ADAPTER, SHARED)
        if adapter in layer.colora_address
    ]


def _tail(tensor: Tensor, letter: str, rank: int) -> list[Tensor]:
    """Views of what lies beyond a rank, each number once."""
    rows = [tensor[rank:]] if letter in "APQ" else []
    columns = [tensor[:rank, rank:]] if letter == "P" else [tensor[:, rank:]] if letter == "B" else []
    return rows + columns


@torch.no_grad()
def _cut(module: nn.Module, rank: int) -> None:
    """Zero what lies beyond a rank, in place."""
    for tensors in _layers(module):
        for letter, tensor in tensors.items():
            for part in _tail(tensor, letter, rank):
                part.zero_()


def _norms(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Norms of the tails of A and of B, or of P and Q together."""
    squares = {
        letter: sum(part.square().sum() for part in _tail(tensor.detach(), letter, rank))
        for letter, tensor in tensors.items()
    }
    if "A" in squares:
        return {letter: torch.as_tensor(square).sqrt() for letter, square in squares.items()}
    return dict.fromkeys("PQ", torch.as_tensor(sum(squares.values())).sqrt())


def _size(module: nn.Module, rank: int) -> float:
    """How much the tails do, all layers together."""
    total = 0.0
    for tensors in _layers(module):
        norms = _norms(tensors, rank)
        total += float(norms["A"] * norms["B"]) if "A" in norms else float(norms["P"])
    return total


@torch.no_grad()
def _add_penalty(module: nn.Module, rank: int, strength: float) -> None:
    """Add the gradient of the tails' sizes, which is none where a tail is zero."""
    for tensors in _layers(module):
        norms = _norms(tensors, rank)
        for letter, tensor in tensors.items():
            if tensor.grad is None or not norms[letter] > 0:
                continue
            other = norms["B" if letter == "A" else "A"] if "A" in norms else 1.0
            for part, gradient in zip(_tail(tensor, letter, rank), _tail(tensor.grad, letter, rank), strict=True):
                gradient.add_(part * (strength * other / norms[letter]))
