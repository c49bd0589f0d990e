"""`PublicDistillation`: clients' predictions on public data travel, and the mean adapter learns their mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_pfl.adapters import adapter_parameters
from lightning_pfl.adapters.injection import ADAPTER, SHARED, adapted_layers
from lightning_pfl.callbacks.federated import Exchange
from lightning_pfl.callbacks.mutual_teachers import divergence
from lightning_pfl.callbacks.two_adapters import alone
from lightning_pfl.types import FlatTensors, Personalized, SharedTensors

__all__ = ["PublicDistillation"]


@final
class PublicDistillation(Exchange):
    r"""Before it trains, a client teaches the adapter that it received the mean of all clients' public predictions.

    At a turn's end a client sends its exchanged adapter's logits on the public set. The server averages them as it
    averages any tensor, over those clients that have as many classes, which for language models means one vocabulary:
    families with other vocabularies teach among themselves. At the next turn's start every client of one architecture
    holds the same mean adapter, the same public set and the same mean logits, and takes the same steps without any
    randomness (evaluation mode, batches in order). So each of them makes for itself what a server would make once for
    all, without a model on the server; the price is those steps and the logits' bytes. What is evaluated between turns
    is the adapter before distillation.

    It stands after `CoLoRA` and before `TwoAdapters`, needs a rule that averages (`FedAvg`), and asks for the
    logits whenever something is sent or received.

    Args:
        batches: ``module -> batches`` of the public set, the same for all clients, on the module's device.
        logits: ``(module, batch) -> [n, classes]``, one row per prediction that counts, from a differentiable pass.
        epochs: passes over the public set per turn.
        lr: learning rate of these steps (AdamW without weight decay, started anew in every turn).
        temperature: T of the `divergence` that is minimised.

    Raises:
        ValueError: a number out of range; in a fit, mean logits that do not fit the public set.

    Source:
        Ensemble distillation: Lin et al. (FedDF), NeurIPS 2020, arXiv:2006.07242.
    """

    def __init__(
        self,
        batches: Callable[[Any], Sequence[Any]],
        logits: Callable[[Any, Any], Tensor],
        *,
        epochs: int = 1,
        lr: float = 1e-3,
        temperature: float = 2.0,
    ) -> None:
        if epochs < 1 or not lr > 0 or not temperature > 0:
            raise ValueError(
                "Distillation takes at least one epoch, a learning rate and a temperature above 0, but got "
                f"epochs={epochs}, lr={lr}, temperature={temperature}."
            )
        self.batches = batches
        self.logits = logits
        self.epochs = epochs
        self.lr = lr
        self.temperature = temperature
        self._target: Tensor | None = None

    @override
    def architecture(self, module: L.LightningModule) -> str:
        """The same for all; it shares nothing that an architecture binds."""
        return "public"

    @override
    @torch.no_grad()
    def upload(self, module: L.LightningModule) -> SharedTensors:
        """The exchanged adapter's logits on the public set."""
        with _evaluating(module), alone(module, _exchanged(module)):
            found = torch.cat([self.logits(module, batch).float() for batch in self.batches(module)])
        return SharedTensors(FlatTensors.pack({_name(found.shape[1]): found}))

    @override
    def receive(self, module: L.LightningModule, personalized: Personalized) -> None:
        """Keep the mean logits until training starts."""
        if personalized.start is not None:
            self._target = next(iter(personalized.start.common.unpack().values()), None)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        target, self._target = self._target, None
        if target is None:
            return
        adapters = adapter_parameters(pl_module)
        own = _exchanged(pl_module)
        held = [p for name, p in {**adapters.pq, **adapters.ab}.items() if name.endswith(f".{own}")]
        optimizer = torch.optim.AdamW(held, lr=self.lr, weight_decay=0.0)
        batches = self.batches(pl_module)
        with torch.enable_grad(), _evaluating(pl_module), alone(pl_module, own):
            for _ in range(self.epochs):
                start = 0
                for batch in batches:
                    student = self.logits(pl_module, batch)
                    teacher = target[start : start + len(student)].to(student)
                    start += len(student)
                    loss = divergence(student, teacher, self.temperature)
                    gradients = torch.autograd.grad(loss, held, allow_unused=True)
                    for parameter, gradient in zip(held, gradients, strict=True):
                        parameter.grad = gradient
                    optimizer.step()
                if start != len(target):
                    raise ValueError(
                        f"The mean logits have {len(target)} rows, but this client's public set gives {start}. All "
                        "clients must have the same public set."
                    )
        for parameter in held:
            parameter.grad = None


def _exchanged(module: nn.Module) -> str:
    return next(SHARED if SHARED in layer.colora_address else ADAPTER for _, layer in adapted_layers(module))


def _name(classes: int) -> str:
    return f"public/{classes}/logits"


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode for a while, then each part in the mode it was in."""
    before = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training
