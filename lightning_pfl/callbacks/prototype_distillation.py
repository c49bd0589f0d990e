"""`PrototypeDistillation`: the mean adapter learns from each architecture by itself, and the lessons are added up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_pfl.callbacks.public_distillation import Logits, all_logits
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

__all__ = ["PrototypeDistillation"]


@final
class PrototypeDistillation(PublicExchange):
    r"""Before it trains, a client adds what each architecture's ensemble teaches to the adapter that it received.

    From the received :math:`\theta` anew for every architecture m, whose clients' mean logits are :math:`\bar z_m`,

    .. math::
        \theta_m = \arg\min_\vartheta D_T(z(\vartheta), \bar z_m) + \gamma\, D_{T'}(z(\vartheta), z(\theta)), \quad
        \theta \leftarrow \theta + \sum_m \lambda_m (\theta_m - \theta)

    with D the `divergence` at two temperatures and all :math:`\lambda_m` equal, sum 1. It stands after `CoLoRA` and
    needs ``Distilled(FedAvg(), PrototypeMeans())``. The student's own architecture is one of the teachers.

    Args:
        batches: ``module -> batches`` of the public set, the same for all clients, on the module's device.
        logits: what a module predicts of a batch; all architectures that are to teach each other predict among the
            same classes, which for language models of several families are the offered answers.
        epochs: passes over the public set per teacher and turn.
        lr: learning rate of these steps (AdamW without weight decay, started anew for every teacher).
        temperature: T, of what is learned from a teacher.
        self_weight: gamma, of staying near what the received adapter predicts.
        self_temperature: T', of that.

    Raises:
        ValueError: a number out of range; in a fit, logits that do not fit the public set.

    Source:
        TAKFL, Morafah et al., NeurIPS 2024, arXiv:2409.18461, equations 3 to 6.
    """

    def __init__(
        self,
        batches: Batches,
        logits: Logits,
        *,
        epochs: int = 1,
        lr: float = 1e-3,
        temperature: float = 3.0,
        self_weight: float = 0.01,
        self_temperature: float = 20.0,
    ) -> None:
        super().__init__(batches, epochs=epochs, lr=lr)
        if not temperature > 0 or not self_temperature > 0 or self_weight < 0:
            raise ValueError(
                "Temperatures must be above 0 and `self_weight` at least 0, but got "
                f"temperature={temperature}, self_temperature={self_temperature}, self_weight={self_weight}."
            )
        self.logits = logits
        self.temperature = temperature
        self.self_weight = self_weight
        self.self_temperature = self_temperature

    @override
    def predictions(self, module: L.LightningModule) -> dict[str, Tensor]:
        """The exchanged adapter's logits."""
        with alone(module, adapter_exchanged(module)):
            return all_logits(module, self.batches(module), self.logits)

    @override
    def learn(self, module: L.LightningModule, received: Mapping[str, Tensor]) -> None:
        """One task vector per teacher, and their mean on top."""
        (teachers,) = received.values()
        adapter = adapter_exchanged(module)
        parameters = parameters_of(module, adapter)
        before = [p.detach().clone() for p in parameters]
        steps = [torch.zeros_like(p) for p in before]
        with torch.no_grad():
            (own,) = self.predictions(module).values()
        batches = self.batches(module)
        with alone(module, adapter):
            for teacher in teachers:
                with torch.no_grad():
                    for p, value in zip(parameters, before, strict=True):
                        p.copy_(value)
                self._learn_one(module, batches, teacher, own)
                with torch.no_grad():
                    for step, p, value in zip(steps, parameters, before, strict=True):
                        step.add_(p - value, alpha=1 / len(teachers))
        with torch.no_grad():
            for p, value, step in zip(parameters, before, steps, strict=True):
                p.copy_(value + step)

    def _learn_one(self, module: L.LightningModule, batches: Any, teacher: Tensor, own: Tensor) -> None:
        def loss(batch: Any, start: int) -> tuple[Tensor, int]:
            student = self.logits(module, batch)
            away = divergence(student, rows_for(teacher, start, student), self.temperature)
            drift = divergence(student, rows_for(own, start, student), self.self_temperature)
            return away + self.self_weight * drift, len(student)

        parameters = parameters_of(module, adapter_exchanged(module))
        descend(parameters, batches, loss, epochs=self.epochs, lr=self.lr, rows=len(teacher))
