"""`SelectiveTransfer`: clients learn from each other only where another one knows better, by way of a model of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_pfl.adapters.injection import ADAPTER, SHARED
from lightning_pfl.adapters.shared import add_shared_adapter, show
from lightning_pfl.callbacks.federated import AdapterUser
from lightning_pfl.callbacks.public_set import Batches, PublicExchange, descend, parameters_of, rows_for
from lightning_pfl.callbacks.two_adapters import alone
from lightning_pfl.functional.distillation import soft_cross_entropy

__all__ = ["Graded", "SelectiveTransfer"]

Graded = Callable[[Any, Any], tuple[Tensor, Tensor]]
"""``(module, batch) -> (losses [n], logits [n, classes])``: what a model predicts of a batch and how far that is from
the truth, row by row, from one differentiable pass."""


@final
class SelectiveTransfer(AdapterUser, PublicExchange):
    r"""Before it trains, a client learns from others' predictions on those public examples where they know better.

    Each client holds a second adapter s, the server's model, which is never trained on its own data and the same on all
    clients of one architecture that have received the same. Two steps, both on public data:

    1. s learns from the best client :math:`k^*_i` of each example i, where that client's loss is lower than its own;
    2. the client's own adapter learns from s, where the loss of s is lower than its own.

    The loss of both is :math:`\lambda\, \ell_i + (1 - \lambda)\, H(\sigma(z^*_i), \sigma(z_i))` over the chosen
    examples, with the example's own loss and the cross-entropy against the teacher's probabilities. It stands after
    `CoLoRA`, trains with the user's own step, and needs the rule ``Distilled(..., LowestLoss())``.

    Args:
        batches: ``module -> batches`` of the public set, the same for all clients, on the module's device; it has
            labels.
        outputs: what a module makes of a batch, row by row.
        epochs: passes over the public set per turn, in each of the two steps.
        lr: learning rate of these steps (AdamW without weight decay, started anew in every turn).
        label_weight: lambda, 0 to 1.

    Raises:
        ValueError: a number out of range; in a fit, predictions that do not fit the public set.

    Source:
        FedMKT, Fan et al., COLING 2025, arXiv:2406.02224, algorithms 1 and 2.
    """

    def __init__(
        self, batches: Batches, outputs: Graded, *, epochs: int = 1, lr: float = 1e-3, label_weight: float = 0.9
    ) -> None:
        super().__init__(batches, epochs=epochs, lr=lr)
        if not 0 <= label_weight <= 1:
            raise ValueError(f"`label_weight` is the labels' share of the loss, 0 to 1, but is {label_weight}.")
        self.outputs = outputs
        self.label_weight = label_weight

    @override
    def adapters_ready(self, module: L.LightningModule) -> None:
        add_shared_adapter(module)
        show(module, ADAPTER)

    @override
    def predictions(self, module: L.LightningModule) -> dict[str, Tensor]:
        """Logits and losses of the client's own adapter."""
        losses, logits = self._graded(module, ADAPTER)
        return {f"{logits.shape[1]}/logits": logits, f"{logits.shape[1]}/losses": losses}

    @override
    def learn(self, module: L.LightningModule, received: Mapping[str, Tensor]) -> None:
        """First the model of all, then the client's own."""
        (logits,) = (value for name, value in received.items() if name.endswith("/logits"))
        (losses,) = (value for name, value in received.items() if name.endswith("/losses"))
        self._learn_from(module, SHARED, losses, logits)
        self._learn_from(module, ADAPTER, *self._graded(module, SHARED))

    @torch.no_grad()
    def _graded(self, module: L.LightningModule, adapter: str) -> tuple[Tensor, Tensor]:
        """One adapter's losses ``[n]`` and logits ``[n, classes]`` on the whole public set."""
        with alone(module, adapter):
            found = [self.outputs(module, batch) for batch in self.batches(module)]
        return torch.cat([losses.float() for losses, _ in found]), torch.cat([logits.float() for _, logits in found])

    def _learn_from(self, module: L.LightningModule, adapter: str, losses: Tensor, logits: Tensor) -> None:
        """Train one adapter on the rows where a teacher's loss was lower than the adapter's before the first step."""
        mine, _ = self._graded(module, adapter)
        better = rows_for(losses, 0, mine) < mine

        def loss(batch: Any, start: int) -> tuple[Tensor | None, int]:
            errors, student = self.outputs(module, batch)
            chosen = better[start : start + len(student)]
            if not chosen.any():
                return None, len(student)
            soft = soft_cross_entropy(student, rows_for(logits, start, student))
            both = self.label_weight * errors + (1 - self.label_weight) * soft
            return both[chosen].mean(), len(student)

        with alone(module, adapter):
            descend(
                parameters_of(module, adapter),
                self.batches(module),
                loss,
                epochs=self.epochs,
                lr=self.lr,
                rows=len(losses),
            )
