"""`MutualTeachers`: two adapters that learn from a client's data and from each other's predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import lightning as L
from torch import Tensor
from typing_extensions import override

from lightning_pfl.adapters.injection import SHARED
from lightning_pfl.callbacks.two_adapters import Step, Training, alone
from lightning_pfl.functional.distillation import divergence

__all__ = ["MutualTeachers", "Outputs"]

Outputs = Callable[[Any, Any], tuple[Tensor, Tensor]]
"""``(module, batch) -> (loss [], logits [n, classes])``: what a client's model makes of a batch, both in one pass."""


@final
@dataclass(frozen=True)
class MutualTeachers(Training):
    r"""Each batch trains both adapters, each towards the labels and towards the other's predictions. FedDAT's solver.

    .. math::
        L_{shared} = CE(z_s) + \alpha\, D(z_s, z_d), \quad L_{kept} = CE(z_d) + \beta\, D(z_d, z_s)

    with z_s the logits of the shared adapter alone, z_d those of the kept adapter and the frozen global branch together
    (the dual-adapter teacher), and D the `divergence`, in which the teacher is fixed.

    Args:
        outputs: the loss and the logits of a batch, ``[n, classes]``, one row per prediction that counts. It stands in
            for the user's ``training_step``.
        alpha: how much the shared adapter listens to the dual one.
        beta: how much the dual one listens to the shared one.
        temperature: T of both.

    Raises:
        ValueError: a negative weight, a temperature that is not positive, no `outputs`.
    """

    outputs: Outputs | None = None
    alpha: float = 1.0
    beta: float = 1.0
    temperature: float = 3.0

    def __post_init__(self) -> None:
        if self.outputs is None or self.alpha < 0 or self.beta < 0 or not self.temperature > 0:
            raise ValueError(
                "Mutual teachers need `outputs`, weights of at least 0 and a temperature above 0, but got "
                f"outputs={self.outputs}, alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}."
            )

    @override
    def step(self, module: L.LightningModule, batch: Any, step: Step, *, done: int, total: int) -> Any:
        assert self.outputs is not None
        with alone(module, SHARED):
            loss, shared = self.outputs(module, batch)
        own_loss, dual = self.outputs(module, batch)
        loss = loss + self.alpha * divergence(shared, dual, self.temperature)
        return loss + own_loss + self.beta * divergence(dual, shared, self.temperature)
