"""`GradientProbe`: per-example gradients of named parameters of any frozen module, by ``torch.func``.

A LightningModule needs nothing but the names: its loss is its own ``training_step``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, final

import lightning as L
import torch
from torch import Tensor, nn

from lightning_pfl.functional.privacy import clip_rows
from lightning_pfl.relevance.base import ExampleProbe
from lightning_pfl.relevance.sketches import CountSketch, Projection

__all__ = ["GradientProbe", "examples_of", "gradient_of"]

Loss = Callable[[nn.Module, Any], Tensor]


@final
class GradientProbe(ExampleProbe):
    """Sketches a task by the gradient of a loss in some parameters of a small frozen module.

    Args:
        module: the proxy, the same for all clients; put into evaluation mode and frozen in place by `prepare`. Or a
            function without arguments that makes it.
        loss: ``loss(module, batch)`` gives the mean loss of a batch, a scalar, with ``module`` called inside. None: the
            ``training_step`` of a LightningModule, which may log, but must not need a Trainer.
        parameters: names, or patterns such as ``"layer4.*"``, of the parameters whose gradient is sketched. Few, late
            ones are cheap and tell most.
        size: k, the length of a sketch.
        seed: of the projection; the same for all clients.
        projection: of gradients to sketches, instead of a `CountSketch` of ``size`` and ``seed``. A `ColumnSketch`
            takes the gradient of one matrix.
        max_norm: C, each example's sketch is scaled down to this norm; None: not at all. Noise needs it.

    Raises:
        ValueError: in `prepare`, no parameter by these names; in `sketch`, tensors of a batch that differ in length.
        TypeError: in `prepare`, no loss for a module that has none of its own; in `sketch`, a loss that is no scalar.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> probe = GradientProbe(
        ...     nn.Linear(3, 2),
        ...     lambda module, batch: nn.functional.cross_entropy(module(batch["x"]), batch["y"]),
        ...     parameters=["weight"],
        ...     size=64,
        ... )
        >>> probe.sketch({"x": torch.randn(5, 3), "y": torch.tensor([0, 1, 1, 0, 1])}).shape
        torch.Size([64])
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> probe = GradientProbe(BoringModel(), parameters=["layer.*"], size=64)  # its `training_step` is the loss
        >>> probe.sketch(torch.randn(5, 32)).shape
        torch.Size([64])
    """

    def __init__(
        self,
        module: nn.Module | Callable[[], nn.Module],
        loss: Loss | None = None,
        *,
        parameters: Sequence[str],
        size: int = 16_384,
        seed: int = 0,
        projection: Projection | None = None,
        max_norm: float | None = None,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"`max_norm` must be positive, but is {max_norm}.")
        self._source: nn.Module | Callable[[], nn.Module] = module
        self._loss = loss
        self._patterns = tuple([parameters] if isinstance(parameters, str) else parameters)
        self._project = CountSketch(size, seed=seed) if projection is None else projection
        self._max_norm = max_norm
        self._module: nn.Module | None = None
        self._names: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """k."""
        return self._project.size

    @property
    def max_norm(self) -> float | None:
        """C."""
        return self._max_norm

    def prepare(self) -> None:
        """Make and freeze the module, and find the parameters and the loss."""
        if self._module is not None:
            return
        module = self._source if isinstance(self._source, nn.Module) else self._source()
        if self._loss is None:
            if not isinstance(module, L.LightningModule):
                raise TypeError(
                    f"A {type(module).__name__} has no loss of its own, as it is no LightningModule. Pass "
                    "`GradientProbe(module, loss, ...)` with `loss(module, batch)`."
                )
            module.trainer = None  # a proxy that was trained before: its Trainer is neither needed nor to travel
            self._loss = _training_loss
        module.eval().requires_grad_(False)
        available = [name for name, _ in module.named_parameters()]
        for pattern in self._patterns:
            if not any(fnmatchcase(name, pattern) for name in available):
                raise ValueError(
                    f"`parameters` must name parameters of {type(module).__name__}, but {pattern!r} matches none. "
                    f"The last ones are called {available[-4:]}."
                )
        self._names = tuple(name for name in available if any(fnmatchcase(name, each) for each in self._patterns))
        self._source = self._module = module  # what made it need not travel with it

    def sketch(self, batch: Any) -> Tensor:
        """Mean over a batch's examples of each one's projected (and clipped) gradient, float32 ``[k]``."""
        return self.sketches(batch).mean(dim=0)

    def sketches(self, batch: Any) -> Tensor:
        """Each example's projected (and clipped) gradient, float32 ``[n, k]``."""
        self.prepare()
        assert self._module is not None
        assert self._loss is not None
        device = next(self._module.parameters()).device
        rows = []
        for example in examples_of(batch):
            gradients = gradient_of(self._module, self._names, self._loss, _moved(example, device))
            if len(self._names) == 1:
                rows.append(self._project(gradients[self._names[0]]))
            else:
                rows.append(self._project(torch.cat([gradients[name].reshape(-1) for name in self._names])))
        each = torch.stack(rows)
        return each if self._max_norm is None else clip_rows(each, self._max_norm)


def _training_loss(module: nn.Module, batch: Any) -> Tensor:
    """What a LightningModule's ``training_step`` minimises."""
    assert isinstance(module, L.LightningModule)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*self.log.*")  # nobody listens here
        output: Any = module.training_step(batch, 0)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(
            f"The `training_step` of {type(module).__name__} must return its loss, a tensor of one number or a mapping "
            f"with such a `loss`, but returned {type(output).__name__}. Pass `GradientProbe(module, loss, ...)`."
        )
    return loss.reshape(())


class _Loss(nn.Module):
    """A loss as a module, so that ``functional_call`` can swap the parameters underneath it."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.module, batch)


def gradient_of(module: nn.Module, names: Sequence[str], loss: Loss, batch: Any) -> dict[str, Tensor]:
    """Gradient of ``loss(module, batch)`` in the named parameters; leaves the module, ``.grad`` and grad mode alone.

    Args:
        module: any module; its parameters need not require gradients.
        names: of the parameters.
        loss: gives a scalar.
        batch: handed to ``loss``.

    Returns:
        Per name a tensor in the parameter's shape and dtype.

    Example:
        >>> linear = nn.Linear(2, 1)
        >>> gradient_of(linear, ["weight"], lambda module, x: module(x).sum(), torch.tensor([[3.0, 4.0]]))
        {'weight': tensor([[3., 4.]])}
    """
    wrapped = _Loss(module, loss)
    parameters = {name: module.get_parameter(name).detach() for name in names}

    def value(current: dict[str, Tensor]) -> Tensor:
        swapped = {f"module.{name}": tensor for name, tensor in current.items()}
        result: Tensor = torch.func.functional_call(wrapped, swapped, (batch,))
        return result

    device = next(iter(parameters.values())).device.type
    with torch.autocast(device, enabled=False):
        gradients: dict[str, Tensor] = torch.func.grad(value)(parameters)
    return {name: gradient.detach() for name, gradient in gradients.items()}


def examples_of(batch: Any) -> list[Any]:
    """Cut a batch into batches of one example each, along the first dimension of every tensor.

    Mappings, lists and tuples are cut inside; anything else (a number, a text, None) is repeated.

    Raises:
        ValueError: no tensor, or tensors whose first dimensions differ.

    Example:
        >>> [example["y"].tolist() for example in examples_of({"y": torch.tensor([3, 4]), "task": "flags"})]
        [[3], [4]]
    """
    lengths = sorted(set(_lengths(batch)))
    if len(lengths) != 1:
        raise ValueError(
            f"All tensors of a batch must have the examples as their first dimension, but the lengths are {lengths}. "
            "Bring the batch into that form in the probe callback's `to_probe=`."
        )
    return [_cut(batch, index) for index in range(lengths[0])]


def _lengths(value: Any) -> list[int]:
    if isinstance(value, Tensor):
        return [value.shape[0] if value.ndim else 0]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [length for part in parts for length in _lengths(part)]


def _cut(value: Any, index: int) -> Any:
    return _mapped(value, lambda tensor: tensor[index : index + 1])


def _moved(value: Any, device: torch.device) -> Any:
    return _mapped(value, lambda tensor: tensor.to(device))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of nested mappings, lists and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [_mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
