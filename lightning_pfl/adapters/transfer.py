"""Does P of one model do another model any good? The measure of an alignment.

Start at `transfer`: P and Q are trained in one model and loaded into another, whose loss is then compared with that of
no adapter and of its own training. `fit_pq` is a plain way of training for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pfl.adapters.injection import config_of
from lightning_pfl.adapters.tensors import adapter_parameters, load_local, shared_tensors
from lightning_pfl.types import SharedTensors

__all__ = ["Transfer", "fit_pq", "transfer"]


@dataclass(frozen=True)
class Transfer:
    """Losses of one model on one task, in the unit of the score that they come from; less is better.

    Attributes:
        zero: without an adapter.
        own: with the P and Q that it trained by itself.
        transferred: with the P and Q that another model trained.

    Example:
        >>> Transfer(zero=1.5, own=1.0, transferred=1.25).recovered
        0.5
    """

    zero: float
    own: float
    transferred: float

    @property
    def recovered(self) -> float:
        """Share of what own training gains that the other model's P and Q gain: 0 is nothing, below 0 harm.

        Not a number where own training gains nothing, so that there is nothing to recover.
        """
        gain = self.zero - self.own
        return (self.zero - self.transferred) / gain if gain > 0 else float("nan")


def transfer(
    source: nn.Module,
    target: nn.Module,
    *,
    fit: Callable[[nn.Module], None],
    score: Callable[[nn.Module], float],
) -> Transfer:
    """Train P and Q in one model, load them into another, and see what they are worth there.

    Args:
        source: a module with adapters, with the bases that are to be judged (`Alignment.apply`).
        target: another one, with the same Co-LoRA layers and rank.
        fit: trains the adapters of a module in place, from zero; given each of the two in turn. Both must be given the
            same task; `fit_pq` trains P and Q alone.
        score: loss of a module on examples that were not trained on; given the target only.

    Returns:
        The three losses. Both modules are left as they were.

    Raises:
        ValueError: a module without adapters, or Co-LoRA layers or ranks that differ.

    Source:
        arXiv:2506.11024 judges an alignment by the federation's accuracy; this isolates it.

    Example:
        >>> from lightning_pfl.adapters import CoLoraConfig, inject
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(model, CoLoraConfig(r=2, num_blocks=1, private_layers=False))
        >>> x, y = torch.randn(32, 4), torch.zeros(32, dtype=torch.int64)
        >>> def loss(module, batch):
        ...     return nn.functional.cross_entropy(module(batch["x"]), batch["y"])
        >>> batches = [{"x": x, "y": y}] * 20
        >>> found = transfer(
        ...     model,
        ...     model,
        ...     fit=lambda module: fit_pq(module, batches, loss=loss, lr=0.05),
        ...     score=lambda module: float(loss(module, batches[0])),
        ... )
        >>> round(found.recovered, 6)  # the same model understands itself
        1.0
    """
    theirs, ours = (shared_tensors(module).common.layout for module in (source, target))
    if theirs != ours:
        only = sorted(set(theirs.names) ^ set(ours.names))
        told = f"only one of them has {only[:4]}" if only else "their shapes differ"
        raise ValueError(
            f"P and Q transfer between models with the same Co-LoRA layers and rank, but {told}. Inject both with the "
            "same rank, num_blocks and target_modules."
        )
    with _from_zero(target):
        zero = score(target)
        fit(target)
        own = score(target)
    with _from_zero(source):
        fit(source)
        found = SharedTensors(shared_tensors(source).common)
    with _from_zero(target):
        load_local(target, found)
        return Transfer(zero, own, score(target))


def fit_pq(
    module: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor],
    lr: float,
) -> None:
    """Train P and Q of a module in place, by one step of Adam per batch; nothing else is changed.

    Args:
        module: with adapters.
        batches: as `loss` takes them.
        loss: of the module and a batch, a scalar.
        lr: step size of Adam.

    Raises:
        ValueError: the module holds no Co-LoRA adapters.

    Example:
        See `transfer`.
    """
    config_of(module)
    trained = list(adapter_parameters(module).pq.values())
    optimizer = torch.optim.Adam(trained, lr=lr)
    for batch in batches:
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(module, batch), trained)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    optimizer.zero_grad()


@contextmanager
def _from_zero(module: nn.Module) -> Iterator[None]:
    """All trained numbers as they are, P and Q at zero; afterwards all as they were."""
    groups = adapter_parameters(module)
    everything = [*groups.pq.values(), *groups.ab.values(), *groups.gates.values()]
    before = [parameter.detach().clone() for parameter in everything]
    try:
        with torch.no_grad():
            for parameter in groups.pq.values():
                parameter.zero_()
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(everything, before, strict=True):
                parameter.copy_(value)
