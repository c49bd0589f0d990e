r"""The losses of several models in one forward and backward pass, where the models differ in some tensors only.

Start at `stackable`, which a module's ``training_step`` calls. By itself it calls the loss and nothing else. A pool
that trains several clients at once takes the call over (`meeting`): it gathers a `Part` of each, and computes them with
`losses_and_gradients`. What all models hold alike is read once; what they train, and their batches, get a leading
dimension (`torch.func.vmap`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_pfl.functional._compat import TreeSpec, editions, groups, tree_flatten, tree_unflatten

__all__ = [
    "ImpureLossError",
    "Inventory",
    "Part",
    "editions",
    "hand_over",
    "losses_and_gradients",
    "meeting",
    "stackable",
]


_REQUIRES_GRAD, _TRAINING = attrgetter("requires_grad"), attrgetter("training")  # quicker than a loop, for each step
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
class Inventory:
    """What a module holds, found by one walk over it.

    Attributes:
        module: whose it is.
        trained: the parameters that want gradients, by name.
        held: all other parameters and buffers.
        form: what another module must agree in, to be stacked with this one.
        obstacle: what speaks against that and would not show by itself; None: nothing.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._children = list(module.modules())
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        first: dict[Tensor, str] = {}
        self._names = {name: first.setdefault(tensor, name) for name, tensor in named}
        tensors = {name: tensor for tensor, name in first.items()}
        self.trained = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
        self.held = {name: tensor for name, tensor in tensors.items() if not tensor.requires_grad}
        self._tensors, self._groups = list(first), groups(self._children)
        self._contents, self._flags = self._read()
        forms = tuple((name, _form(tensor)) for name, tensor in tensors.items())
        self.form: Hashable = (type(module), tuple(self._names.items()), forms, tuple(self._flags))
        self.obstacle: str | None = None
        for name, child in module.named_modules():
            if child.training and getattr(child, "track_running_stats", False):
                self.obstacle = f"`{name}` ({type(child).__name__}) keeps running statistics"

    def is_current(self) -> bool:
        """Whether the module still holds the same tensors, trains the same of them, and is in the same modes."""
        contents, flags = self._read()
        same = len(contents) == len(self._contents) and all(map(operator.is_, contents, self._contents))
        return same and flags == self._flags

    def everywhere(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by all names under which a module holds them, as a tied weight has several."""
        return {name: tensors[first] for name, first in self._names.items() if first in tensors}

    def _read(self) -> tuple[list[Any], list[bool]]:
        contents = list(chain.from_iterable(map(dict.values, self._groups)))
        return contents, [*map(_REQUIRES_GRAD, self._tensors), *map(_TRAINING, self._children)]


@final
@dataclass(frozen=True, eq=False)
class Part:
    """One client's part of a stack.

    Attributes:
        inventory: of the module whose loss it is.
        method: the name of the loss.
        leaves: the batch's tensors, and what else lies in it.
        spec: how they lie in it.
    """

    inventory: Inventory
    method: str
    leaves: Sequence[Any]
    spec: TreeSpec

    @staticmethod
    def of(loss: _Loss, batch: tuple[Any, ...], known: Inventory | None = None) -> Part:
        """What a call of `stackable` brings.

        Args:
            loss: see there.
            batch: see there.
            known: of an earlier call.

        Raises:
            TypeError: the loss is no method of a module.
        """
        module = getattr(loss, "__self__", None)
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"`stackable` takes a method of a module, whose parameters it can find, but was given {loss!r}. Write "
                "`stackable(self.loss_of, batch)`."
            )
        is_known = known is not None and known.module is module and known.is_current()
        return Part(known if known and is_known else Inventory(module), loss.__name__, *tree_flatten(batch))

    @property
    def name(self) -> str:
        """Of the loss, for people."""
        return f"{type(self.inventory.module).__name__}.{self.method}"

    def alone(self) -> Tensor:
        """The loss, by itself."""
        loss: Tensor = getattr(self.inventory.module, self.method)(*tree_unflatten(self.leaves, self.spec))
        return loss

    def form(self) -> Hashable:
        """What two parts must agree in to be stacked, beside the `Inventory.form`."""
        contexts = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in self._devices())
        leaves = tuple(map(_form, self.leaves))
        return self.method, self.spec, leaves, contexts, torch.get_num_threads()

    def obstacle(self) -> str | None:
        """What speaks against stacking and would not show by itself; None: nothing."""
        for kind in self._devices():
            if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
                return "float16 needs its loss scaled before gradients are computed, and bfloat16 does not"
        for leaf in self.leaves:
            if not isinstance(leaf, Tensor | int | float | str | None):
                return f"its batch holds a {type(leaf).__name__}, where tensors, tuples, lists and dicts are expected"
        return self.inventory.obstacle

    def _devices(self) -> set[str]:
        return {tensor.device.type for tensor in self.inventory.trained.values()}


def losses_and_gradients(parts: Sequence[Part], own: Collection[str]) -> tuple[Tensor, list[list[Tensor | None]]]:
    """The losses of all parts, and the gradients of what each of them trains.

    Args:
        parts: of one `form`. The first one's module is run.
        own: names of held tensors that differ among them. All others are read from the first.

    Returns:
        Losses ``[parts]``, and for each part a gradient per trained parameter; None where no loss depends on it.

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
    first, inventories = parts[0], [part.inventory for part in parts]
    trained = {
        name: _stack([one.trained[name] for one in inventories]).requires_grad_() for name in inventories[0].trained
    }
    held = {name: _stack([one.held[name] for one in inventories]) for name in own}
    places = [place for place, leaf in enumerate(first.leaves) if isinstance(leaf, Tensor)]
    batches = [_stack([part.leaves[place] for part in parts]) for place in places]
    run = _Method(inventories[0].module, first.method)

    def loss_of(trained: dict[str, Tensor], held: dict[str, Tensor], batch: list[Tensor]) -> Tensor:
        leaves = list(first.leaves)
        for place, leaf in zip(places, batch, strict=True):
            leaves[place] = leaf
        given = {f"module.{name}": one for name, one in inventories[0].everywhere({**trained, **held}).items()}
        after = dict(given)  # where a module has put another tensor into the place of one, it ends up here
        call = tree_unflatten(leaves, first.spec)
        loss: Tensor = torch.func.functional_call(run, after, call, tie_weights=False)
        written.update(name.removeprefix("module.") for name in given if after[name] is not given[name])
        return loss

    written, read = set[str](), {**inventories[0].held, **held}
    before = editions(read.values())
    losses = torch.func.vmap(loss_of)(trained, held, batches)
    written.update(name for name, old, new in zip(read, before, editions(read.values()), strict=True) if old != new)
    if written or not inventories[0].is_current():
        raise ImpureLossError(
            f"`{first.name}` is computed for several clients at once, so it may only read the module's tensors, but it "
            f"changes {sorted(written)[:5] or 'which there are'}. Change them in `training_step`."
        )
    if losses.dim() != 1:
        raise RuntimeError(f"its loss must be one number, but has the shape {tuple(losses.shape[1:])}")
    found = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
    rows = [[None] * len(parts) if gradient is None else gradient.unbind() for gradient in found]
    return losses.detach(), [list(gradients) for gradients in zip(*rows, strict=True)]


def hand_over(part: Part, loss: Tensor, gradients: Sequence[Tensor | None]) -> Tensor:
    """A loss whose ``backward`` adds gradients that are known already, times what comes from above, to a part's."""
    handed: Tensor = _HandOver.apply(loss, gradients, *part.inventory.trained.values())
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
