"""`PublicDistillation`: the mean adapter learns the mean of all clients' predictions on public data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_pfl.callbacks.public_set import (
    Batches,
    PublicExchange,
    adapter_exchanged,
    descend,
    parameters_of,
    rows_for,
)
from lightning_pfl.callbacks.two_adapters import alone
from lightning_pfl.functional.distillation import divergence

__all__ = ["Logits", "PublicDistillation", "all_logits"]

Logits = Callable[[Any, Any], Tensor]
"""``(module, batch) -> [n, classes]``: one row per prediction that counts, from a differentiable pass. For language
models of several vocabularies the classes are the offered answers (`candidate_log_probs`)."""


@final
class PublicDistillation(PublicExchange):
    r"""Before it trains, a client teaches the adapter that it received the mean of all clients' public predictions.

    :math:`\min_w D(z(w), \frac1N \sum_k z_k)`, D the `divergence`, over the public set. It stands after `CoLoRA` and
    before `TwoAdapters`, and needs ``Distilled(FedAvg(), MeanPredictions())``. Clients whose predictions have another
    number of classes, such as vocabularies, teach among themselves.

    Args:
        batches: ``module -> batches`` of the public set, the same for all clients, on the module's device.
        logits: what a module predicts of a batch.
        epochs: passes over the public set per turn.
        lr: learning rate of these steps (AdamW without weight decay, started anew in every turn).
        temperature: T of the divergence.

    Raises:
        ValueError: a number out of range; in a fit, mean logits that do not fit the public set.

    Source:
        Ensemble distillation: Lin et al. (FedDF), NeurIPS 2020, arXiv:2006.07242.
    """

    def __init__(
        self, batches: Batches, logits: Logits, *, epochs: int = 1, lr: float = 1e-3, temperature: float = 1.0
    ) -> None:
        super().__init__(batches, epochs=epochs, lr=lr)
        if not temperature > 0:
            raise ValueError(f"The temperature of distillation must be above 0, but is {temperature}.")
        self.logits = logits
        self.temperature = temperature

    @override
    def predictions(self, module: L.LightningModule) -> dict[str, Tensor]:
        """The exchanged adapter's logits."""
        with alone(module, adapter_exchanged(module)):
            return all_logits(module, self.batches(module), self.logits)

    @override
    def learn(self, module: L.LightningModule, received: Mapping[str, Tensor]) -> None:
        """Steps towards the mean logits."""
        (target,) = received.values()
        adapter = adapter_exchanged(module)

        def loss(batch: Any, start: int) -> tuple[Tensor, int]:
            student = self.logits(module, batch)
            return divergence(student, rows_for(target, start, student), self.temperature), len(student)

        with alone(module, adapter):
            descend(
                parameters_of(module, adapter),
                self.batches(module),
                loss,
                epochs=self.epochs,
                lr=self.lr,
                rows=len(target),
            )


def all_logits(module: L.LightningModule, batches: Any, logits: Logits) -> dict[str, Tensor]:
    """A module's logits on all batches, ``[n, classes]`` in float32, by their name."""
    found = torch.cat([logits(module, batch).float() for batch in batches])
    return {f"{found.shape[1]}/logits": found}
