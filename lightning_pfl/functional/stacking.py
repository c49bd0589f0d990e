r"""The losses of several models in one forward and backward pass, where the models differ in some tensors only.

Start at `stackable`, which a module's ``training_step`` calls. By itself it calls the loss and nothing else. A pool that
trains several clients at once takes the call over (`meeting`): it gathers a `Part` of each, and computes them with
`losses_and_gradients`. What all models hold alike is read once; what they train, and their batches, get a leading
dimension (`torch.func.vmap`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_pfl.functional._compat import TreeSpec, edition, tree_flatten, tree_unflatten

__all__ = ["ImpureLossError", "Part", "edition", "hand_over", "losses_and_gradients", "meeting", "stackable"]


_Loss = Callable[..., Tensor]
_MEETING: ContextVar[Callable[[_Loss, tuple[Any, ...]], Tensor] | None] = ContextVar("meeting", default=None)


class ImpureLossError(RuntimeError):
    """A loss that was to be stacked has changed what it may only read."""


def stackable(loss: _Loss, *batch: Any) -> Tensor:
    """A module's loss, computed together with those of other clients where a `StackedPool` trains several at once.

    Args:
        loss: a method of a module that gives one number. It must be a pure function of the module's tensors and of what
            it is given: it logs nothing, writes to nothing, and decides nothing by numbers that clients differ in
            (their epoch, an attribute). Those are given to it, as tensors. One that draws random numbers (dropout), or
            cannot be stacked for another reason, is computed for each client by itself, and a warning says why.
        batch: its arguments: tensors, and tuples, lists and dicts of them.

    Returns:
        The loss, to be used as ever: logged, added to, accumulated, scaled. It can be derived once.

    Example:
        >>> class Mean(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.value = nn.Parameter(torch.zeros(1))
        ...     def loss_of(self, x):
        ...         return (x - self.value).square().mean()
        ...     def training_step(self, batch, batch_idx):
        ...         return stackable(self.loss_of, batch)
        >>> Mean().training_step(torch.ones(3), 0)
        tensor(1., grad_fn=<MeanBackward0>)
    """
    meet = _MEETING.get()
    return loss(*batch) if meet is None or not torch.is_grad_enabled() else meet(loss, batch)


@contextmanager
def meeting(meet: Callable[[_Loss, tuple[Any, ...]], Tensor]) -> Iterator[None]:
    """Let somebody else compute what is `stackable` in this thread."""
    token = _MEETING.set(meet)
    try:
        yield
    finally:
        _MEETING.reset(token)


@final
@dataclass(frozen=True, eq=False)
class Part:
    """One client's part of a stack.

    Attributes:
        module: whose loss it is.
        method: the name of the loss.
        trained: the parameters that want gradients.
        held: all other parameters and buffers.
        leaves: the batch's tensors, and what else lies in it.
        spec: how they lie in it.
    """

    module: nn.Module
    method: str
    trained: Mapping[str, Tensor]
    held: Mapping[str, Tensor]
    leaves: Sequence[Any]
    spec: TreeSpec

    @staticmethod
    def of(loss: _Loss, batch: tuple[Any, ...]) -> Part:
        """What a call of `stackable` brings.

        Raises:
            TypeError: the loss is no method of a module.
        """
        module = getattr(loss, "__self__", None)
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"`stackable` takes a method of a module, whose parameters it can find, but was given {loss!r}. Write "
                "`stackable(self.loss_of, batch)`."
            )
        parameters = dict(module.named_parameters())
        trained = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
        held = {name: tensor for name, tensor in parameters.items() if not tensor.requires_grad}
        leaves, spec = tree_flatten(batch)
        return Part(module, loss.__name__, trained, held | dict(module.named_buffers()), leaves, spec)

    def alone(self) -> Tensor:
        """The loss, by itself."""
        loss: Tensor = getattr(self.module, self.method)(*tree_unflatten(self.leaves, self.spec))
        return loss

    def form(self) -> Hashable:
        """What two parts must agree in to be stacked."""
        tensors = [self.trained, self.held, dict(enumerate(self.leaves))]
        return (
            (type(self.module), self.method, self.spec),
            *(tuple((name, _form(value)) for name, value in group.items()) for group in tensors),
            tuple(child.training for child in self.module.modules()),
            *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in self._devices()),
            torch.get_num_threads(),
        )

    def obstacle(self) -> str | None:
        """What speaks against stacking and would not show by itself; None: nothing."""
        for name, child in self.module.named_modules():
            if child.training and getattr(child, "track_running_stats", False):
                return f"`{name}` ({type(child).__name__}) keeps running statistics"
        for kind in self._devices():
            if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
                return "float16 needs its loss scaled before gradients are computed; bfloat16 does not"
        for leaf in self.leaves:
            if not isinstance(leaf, Tensor | int | float | str | None):
                return f"its batch holds a {type(leaf).__name__}, where tensors, tuples, lists and dicts are expected"
        return None

    def _devices(self) -> list[str]:
        return sorted({tensor.device.type for tensor in self.trained.values()})


def losses_and_gradients(parts: Sequence[Part], own: Collection[str]) -> tuple[Tensor, list[list[Tensor | None]]]:
    """The losses of all parts, and the gradients of what each of them trains.

    Args:
        parts: of one `form`. The first one's module is run.
        own: names of held tensors that differ among them. All others are read from the first.

    Returns:
        Losses ``[parts]``, and for each part a gradient per trained parameter; None where the loss does not depend on it.

    Raises:
        RuntimeError: the loss cannot be stacked: it draws random numbers, is not one number, or needs an operation that
            `torch.func.vmap` lacks.

    Example:
        >>> class Scale(nn.Module):
        ...     def __init__(self, by):
        ...         super().__init__()
        ...         self.by = nn.Parameter(torch.tensor(by))
        ...     def loss_of(self, x):
        ...         return (self.by * x).square().sum()
        >>> parts = [Part.of(Scale(by).loss_of, (torch.tensor([x]),)) for by, x in ((2.0, 1.0), (3.0, 10.0))]
        >>> losses_and_gradients(parts, own=())  # (by x)^2, and 2 by x^2
        (tensor([  4., 900.]), [[tensor(4.)], [tensor(600.)]])
    """
    first = parts[0]
    trained = {name: _stack([part.trained[name] for part in parts]).requires_grad_() for name in first.trained}
    held = {name: _stack([part.held[name] for part in parts]) for name in own}
    places = [place for place, leaf in enumerate(first.leaves) if isinstance(leaf, Tensor)]
    batches = [_stack([part.leaves[place] for part in parts]) for place in places]
    run = _Method(first.module, first.method)

    def loss_of(trained: dict[str, Tensor], held: dict[str, Tensor], batch: list[Tensor]) -> Tensor:
        leaves = list(first.leaves)
        for place, leaf in zip(places, batch, strict=True):
            leaves[place] = leaf
        given = {f"module.{name}": tensor for name, tensor in {**trained, **first.held, **held}.items()}
        after = dict(given)  # where a module has put another tensor into the place of one, it ends up here
        loss: Tensor = torch.func.functional_call(run, after, tree_unflatten(leaves, first.spec))
        written.update(name.removeprefix("module.") for name in given if after[name] is not given[name])
        return loss

    written, read = set[str](), {**first.held, **held}
    before = {name: edition(tensor) for name, tensor in read.items()}
    losses = torch.func.vmap(loss_of)(trained, held, batches)
    written.update(name for name in before if edition(read[name]) != before[name])
    if written:
        raise ImpureLossError(
            f"`{type(first.module).__name__}.{first.method}` is computed for several clients at once, so it may only read "
            f"the module's tensors, but it writes to {sorted(written)[:5]}. Write to them in `training_step`."
        )
    if losses.dim() != 1:
        raise RuntimeError(f"its loss must be one number, but has the shape {tuple(losses.shape[1:])}")
    found = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
    rows = [[None] * len(parts) if gradient is None else gradient.unbind() for gradient in found]
    return losses.detach(), [list(gradients) for gradients in zip(*rows, strict=True)]


def hand_over(part: Part, loss: Tensor, gradients: Sequence[Tensor | None]) -> Tensor:
    """A loss whose ``backward`` adds gradients that are known already, times what comes from above, to a part's."""
    handed: Tensor = _HandOver.apply(loss, gradients, *part.trained.values())  # type: ignore[no-untyped-call]
    return handed


@final
class _Method(nn.Module):
    """A method of a module as a module."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, *batch: Any) -> Any:
        return getattr(self.module, self.method)(*batch)


@final
class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor | None], *trained: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if gradient is None else gradient * above for gradient in ctx.gradients)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.detach() for tensor in tensors])


def _form(value: Any) -> Hashable:
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else (type(value), value)
