"""`TwoAdapters`: a client trains one adapter that it exchanges and one that it keeps.

Start at the class. How the two are trained is a `Training`: `SideBySide` (Ditto), `Together` (FedSim), `OneAfterOther`
(FedDPA) or `MutualTeachers` (FedDAT, in `mutual_teachers`). Both adapters are parameters of the module, so optimizers,
checkpoints and turns treat them like any other. What else a client trains (`train_also`, gates) follows the kept
adapter's objective alone.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import lightning as L
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pfl.adapters import adapter_parameters
from lightning_pfl.adapters.injection import ADAPTER, SHARED
from lightning_pfl.adapters.shared import add_shared_adapter, show, shows
from lightning_pfl.callbacks.federated import AdapterUser
from lightning_pfl.callbacks.instance_hooks import around, original, restore
from lightning_pfl.callbacks.proximal import pull
from lightning_pfl.callbacks.turns import steps_of_turn

__all__ = ["OneAfterOther", "SideBySide", "Together", "Training", "TwoAdapters", "alone"]

Step = Callable[[], Any]
"""The user's ``training_step`` on the batch of the moment."""


@dataclass(frozen=True)
class Training(ABC):
    """How the shared and the kept adapter are trained."""

    at_rest: tuple[str, ...] = (ADAPTER,)
    """The adapters whose outputs add up in evaluation, and in training where `step` does not say otherwise."""

    strength: float = 0.0
    """How hard the kept adapter is pulled to what the shared one was when the turn began."""

    @abstractmethod
    def step(self, module: L.LightningModule, batch: Any, step: Step, *, done: int, total: int) -> Any:
        """One batch.

        Args:
            module: the client's.
            batch: of the moment.
            step: the user's ``training_step`` on it; it may be called several times.
            done: optimizer steps of this turn so far.
            total: optimizer steps of the whole turn.

        Returns:
            What the user's ``training_step`` may return; its loss is minimised.
        """


@final
@dataclass(frozen=True)
class SideBySide(Training):
    """Each batch trains both, one pass each: the shared adapter alone, then the kept one alone. Ditto's solver.

    Example:
        >>> SideBySide(strength=0.1).at_rest
        ('default',)
    """

    @override
    def step(self, module: L.LightningModule, batch: Any, step: Step, *, done: int, total: int) -> Any:
        with alone(module, SHARED):
            shared = step()
        return _added(step(), shared)


@final
@dataclass(frozen=True)
class Together(Training):
    """Each batch trains both in one pass, their outputs added up. FedSim's solver.

    Example:
        >>> Together().at_rest
        ('default', 'shared')
    """

    at_rest: tuple[str, ...] = (ADAPTER, SHARED)

    @override
    def step(self, module: L.LightningModule, batch: Any, step: Step, *, done: int, total: int) -> Any:
        return step()


@final
@dataclass(frozen=True)
class OneAfterOther(Training):
    """The first half of a turn's steps trains the kept adapter, the second the shared one alone. FedDPA's.

    In the first half the shared adapter stands beside the kept one as the server has sent it, frozen in its global
    branch, and a gate weighs them. In round 0, when the server has sent none, all steps train the shared one. In a turn
    with an odd number of steps the kept one takes the smaller half.

    Example:
        >>> OneAfterOther().at_rest
        ('default',)
    """

    @override
    def step(self, module: L.LightningModule, batch: Any, step: Step, *, done: int, total: int) -> Any:
        is_first = getattr(module.trainer.strategy, "round", None) == 0
        if done < total // 2 and not is_first:
            return step()
        with alone(module, SHARED, silent=False):
            return step()


@final
class TwoAdapters(AdapterUser):
    """Gives a client a second adapter, which it exchanges, and trains both. Stands after `CoLoRA`.

    The step is the user's ``training_step``, with automatic optimization. Where a batch takes two passes, only the kept
    adapter's logs.

    Args:
        training: how.

    Raises:
        TypeError: in a fit, a module with manual optimization, whose steps cannot be added up.

    Example:
        >>> from lightning_pfl.callbacks.colora import CoLoRA
        >>> callbacks = [CoLoRA(rank=2, alpha=4, num_blocks=1), TwoAdapters(SideBySide(strength=0.1))]
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self._anchors: Mapping[str, Tensor] = {}
        self._first_step = 0
        self._total = 0

    @override
    def adapters_ready(self, module: L.LightningModule) -> None:
        add_shared_adapter(module)
        show(module, *self.training.at_rest)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise TypeError(
                f"Two adapters are trained by the losses that `training_step` returns, but {type(pl_module).__name__} "
                "optimizes by hand. Use automatic optimization, or a method with one adapter."
            )
        self._first_step, self._total = trainer.global_step, steps_of_turn(trainer)
        self._anchors = {kept: shared.detach().clone() for kept, (_, shared) in _pairs(pl_module).items()}
        around(pl_module, "training_step", _training_step, self)

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer, *_: Any
    ) -> None:
        if self.training.strength:
            mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
            kept = {name: p for name, (p, _) in _pairs(pl_module).items() if id(p) in mine}
            pull(kept, self._anchors, self.training.strength)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        restore(pl_module, "training_step")
        self._anchors = {}

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        restore(pl_module, "training_step")


@contextmanager
def alone(module: L.LightningModule, *names: str, silent: bool = True) -> Iterator[None]:
    """A pass through some adapters that trains nothing else and, if silent, logs nothing.

    Args:
        module: with two adapters.
        names: of the adapters that the pass sees.
        silent: leave out what the user's step logs.
    """
    ending = tuple(f".{name}" for name in names)
    adapters = adapter_parameters(module)
    mine = {name for name in (*adapters.pq, *adapters.ab) if name.endswith(ending)}
    others = [p for name, p in module.named_parameters() if p.requires_grad and name not in mine]
    if silent:
        around(module, "log", _nothing)
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        with shows(module, *names):
            yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
        if silent:
            restore(module, "log")


def _training_step(module: L.LightningModule, callback: TwoAdapters, batch: Any, batch_idx: int) -> Any:
    """What stands around the user's step while a client trains."""
    own = original(module, "training_step")
    arguments = (batch, batch_idx)[: 2 if _takes_index(own) else 1]
    done = module.trainer.global_step - callback._first_step
    return callback.training.step(module, batch, lambda: own(*arguments), done=done, total=callback._total)


def _takes_index(step: Callable[..., Any]) -> bool:
    parameters = inspect.signature(step).parameters.values()
    return len(parameters) > 1 or any(one.kind is one.VAR_POSITIONAL for one in parameters)


def _nothing(*_: Any, **__: Any) -> None:
    """What ``log`` does in a silent pass."""


def _added(output: Any, other: Any) -> Any:
    """A step's output with another step's loss added; None, as Lightning has it, skips the batch."""
    if output is None or other is None:
        return None
    more: Tensor = other["loss"] if isinstance(other, Mapping) else other
    return {**output, "loss": output["loss"] + more} if isinstance(output, Mapping) else output + more


def _pairs(module: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """The kept adapter's parameters by name, each with its shared counterpart."""
    adapters = adapter_parameters(module)
    both = {**adapters.pq, **adapters.ab}
    return {
        name: (p, both[f"{name.removesuffix(ADAPTER)}{SHARED}"])
        for name, p in both.items()
        if name.endswith(f".{ADAPTER}")
    }
