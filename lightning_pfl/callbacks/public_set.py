"""What callbacks have in common whose clients learn from each other's predictions on a public set.

Start at `PublicExchange`. A client that has received predictions learns from them before it trains. All clients of one
architecture that start from the same adapter then take the same steps, without any randomness (evaluation mode, batches
in order), so each of them makes for itself what a server would make once for all, without a model on the server. The
price is those steps and the predictions' bytes, and that what is evaluated between turns has not yet learned.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_pfl.adapters import adapter_parameters
from lightning_pfl.adapters.injection import adapted_layers
from lightning_pfl.adapters.shared import exchanged
from lightning_pfl.callbacks.federated import Exchange
from lightning_pfl.functional.distillation import PUBLIC
from lightning_pfl.types import FlatTensors, Personalized, SharedTensors

__all__ = ["Batches", "PublicExchange", "adapter_exchanged", "descend", "parameters_of", "rows_for"]

Batches = Callable[[Any], Sequence[Any]]
"""``module -> batches`` of the public set: the same for all clients, in the same order, on the module's device."""

Loss = Callable[[Any, int], tuple[Tensor | None, int]]
"""``(batch, first row) -> (loss, rows)``: what a batch is worth, None to pass over it, and how many rows it has."""


class PublicExchange(Exchange):
    """A callback whose clients exchange predictions on a public set.

    It stands after `CoLoRA` and needs the rule `Distilled`.

    Args:
        batches: the public set.
        epochs: passes over it per turn.
        lr: learning rate of these steps.

    Raises:
        ValueError: a number out of range.
    """

    prefix = PUBLIC

    def __init__(self, batches: Batches, *, epochs: int, lr: float) -> None:
        if epochs < 1 or not lr > 0:
            raise ValueError(
                "Learning from a public set takes at least one epoch and a learning rate above 0, but got "
                f"epochs={epochs}, lr={lr}."
            )
        self.batches = batches
        self.epochs = epochs
        self.lr = lr
        self._received: Mapping[str, Tensor] = {}

    @abstractmethod
    def predictions(self, module: L.LightningModule) -> dict[str, Tensor]:
        """What the client predicts, by names that hold the number of classes, without a gradient."""

    @abstractmethod
    def learn(self, module: L.LightningModule, received: Mapping[str, Tensor]) -> None:
        """Learn from what has come, in place, in evaluation mode.

        Args:
            module: the client's.
            received: by the names of `predictions`.
        """

    @override
    def architecture(self, module: L.LightningModule) -> str:
        """The same for all; it shares nothing that an architecture binds."""
        return "public"

    @override
    @torch.no_grad()
    def upload(self, module: L.LightningModule) -> SharedTensors:
        """The predictions."""
        with _evaluating(module):
            found = {f"{PUBLIC}{name}": value for name, value in self.predictions(module).items()}
        return SharedTensors(FlatTensors.pack(found))

    @override
    def receive(self, module: L.LightningModule, personalized: Personalized) -> None:
        """Keep what has come until training starts."""
        if personalized.start is not None:
            sent = personalized.start.common.unpack().items()
            self._received = {name.removeprefix(PUBLIC): value for name, value in sent if name.startswith(PUBLIC)}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        received, self._received = self._received, {}
        if received:
            with torch.enable_grad(), _evaluating(pl_module):
                self.learn(pl_module, received)


def adapter_exchanged(module: nn.Module) -> str:
    """Name of the adapter that the module's client sends."""
    return next(exchanged(layer) for _, layer in adapted_layers(module))


def parameters_of(module: nn.Module, adapter: str) -> list[nn.Parameter]:
    """P, Q, A and B of one adapter."""
    found = adapter_parameters(module)
    return [p for name, p in {**found.pq, **found.ab}.items() if name.endswith(f".{adapter}")]


def descend(
    parameters: Sequence[nn.Parameter],
    batches: Sequence[Any],
    loss: Loss,
    *,
    epochs: int,
    lr: float,
    rows: int,
) -> None:
    """One step of AdamW per batch, in order, started anew and without weight decay.

    Args:
        parameters: what is trained, in place; gradients are gone afterwards.
        batches: of the public set.
        loss: of a batch.
        epochs: how often.
        lr: learning rate.
        rows: how many there must be in all.

    Raises:
        ValueError: the batches have more or fewer rows.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for _ in range(epochs):
        start = 0
        for batch in batches:
            value, number = loss(batch, start)
            start += number
            if value is None:
                continue
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        if start != rows:
            raise _other_set(rows, start)
    for parameter in parameters:
        parameter.grad = None


def rows_for(received: Tensor, start: int, student: Tensor) -> Tensor:
    """What has come about the same rows as a batch's predictions.

    Args:
        received: ``[rows of the whole set, ...]``.
        start: first row of the batch.
        student: the batch's predictions, ``[n, ...]``.

    Raises:
        ValueError: there are not as many.
    """
    rows = received[start : start + len(student)]
    if len(rows) < len(student):
        raise _other_set(len(received), start + len(student))
    return rows.to(student)


def _other_set(came: int, here: int) -> ValueError:
    return ValueError(
        f"The predictions that came have {came} rows, but this client's public set gives {here}. All clients must have "
        "the same public set."
    )


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
