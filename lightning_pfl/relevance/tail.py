r"""The tail of a causal language model, from its last MLP's output to the loss, and its exact Jacobian in closed form.

Start at `trace_tail`: it reads the tail from one forward pass (which layers are called after the last MLP's output
projection, in which order), so that post-feed-forward norms, final norms and output projections of any family are
found rather than assumed. `Tail.pull_back` carries a gradient at the logits back to the projection's output. Residual
additions are transparent: their derivative is one. What the trace cannot explain raises `UnknownTailError`; whoever
builds on a tail should check it once against autograd, as `CausalLMProbe` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_pfl.relevance import _compat

__all__ = [
    "Projection",
    "Scaling",
    "Tail",
    "UnknownTailError",
    "capture",
    "find_target",
    "is_linear",
    "trace_tail",
    "widened",
]

_CHUNK = 8_192  # rows of a vocabulary that are cast to float32 at a time


class UnknownTailError(ValueError):
    """A model's tail has a part whose Jacobian is not known here."""


@dataclass(frozen=True)
class Scaling:
    r"""A normalising layer, :math:`y = g \odot (x - c\,\mathrm{mean}(x)) / \mathrm{rms} + b`.

    Attributes:
        name: of the module, in the model.
        centred: whether the mean is taken off (LayerNorm) or not (RMSNorm).
        offset: what is added to the stored weight to give the gain: 1 for Gemma, else 0.
        eps: what is added to the mean square.
    """

    name: str
    centred: bool
    offset: float
    eps: float

    def gain(self, model: nn.Module, size: int) -> Tensor:
        """The gain g, ``[size]``, float32 at least."""
        weight = getattr(model.get_submodule(self.name), "weight", None)
        return torch.ones(size) if weight is None else widened(weight.detach()) + self.offset

    def pull_back(self, model: nn.Module, gradient: Tensor, entered: Tensor) -> Tensor:
        """Gradient at the output to gradient at the input; both ``[M, d]``, ``entered`` is the input."""
        centre = entered.mean(dim=1, keepdim=True) if self.centred else torch.zeros_like(entered[:, :1])
        offset = entered - centre
        inverse = (offset.square().mean(dim=1, keepdim=True) + self.eps).rsqrt()
        unit = offset * inverse
        gained = gradient * self.gain(model, entered.shape[1]).to(gradient.device)
        inner = gained - unit * (gained * unit).mean(dim=1, keepdim=True)
        return inverse * (inner - inner.mean(dim=1, keepdim=True) if self.centred else inner)


@dataclass(frozen=True)
class Projection:
    """A linear layer between the last block and the head (OPT-350M projects down to its embeddings' width).

    Attributes:
        name: of the module, in the model.
    """

    name: str

    def pull_back(self, model: nn.Module, gradient: Tensor, entered: Tensor) -> Tensor:
        """Gradient at the output, ``[M, out]``, to gradient at the input, ``[M, in]``."""
        return gradient @ widened(_matrix(model.get_submodule(self.name)))


Step: TypeAlias = Scaling | Projection


@dataclass(frozen=True)
class Tail:
    """What lies behind a model's last MLP.

    Attributes:
        target: name of the linear whose weight's gradient is wanted.
        steps: what is called after it and before the head, in this order.
        head: name of the linear that makes logits.
        softcap: bound c of ``c * tanh(logits / c)``, or None.
    """

    target: str
    steps: tuple[Step, ...]
    head: str
    softcap: float | None

    def factors(
        self, model: nn.Module, captured: dict[str, tuple[Tensor, Tensor]], positions: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        r"""Per position the two vectors whose outer product is its gradient of the cross entropy.

        Args:
            model: the model.
            captured: input and output of ``target`` and of every step, by name, from `capture`.
            positions: which rows ``[M]`` of the flattened batch predict an answer token.
            labels: that token, ``[M]``.

        Returns:
            ``a``, shape ``[M, d_out]``, and ``u``, shape ``[M, d_in]``, both float32, or float64 for a float64 model:
            the gradient of position t's cross entropy in the target's matrix ``[d_out, d_in]`` is :math:`a_t u_t^T`.
        """

        def rows(tensor: Tensor) -> Tensor:
            return widened(tensor.reshape(-1, tensor.shape[-1])[positions])

        last = captured[self.steps[-1].name if self.steps else self.target][1]
        gradient = self._at_head_input(model, rows(last), labels)
        for step in reversed(self.steps):
            gradient = step.pull_back(model, gradient, rows(captured[step.name][0]))
        return gradient, rows(captured[self.target][0])

    def _at_head_input(self, model: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
        """Gradient of each position's cross entropy at the head's input, ``[M, d]``."""
        head = model.get_submodule(self.head)
        matrix, bias = _matrix(head), getattr(head, "bias", None)
        chunks = [slice(start, start + _CHUNK) for start in range(0, matrix.shape[0], _CHUNK)]
        logits = torch.cat([hidden @ widened(matrix[chunk]).T for chunk in chunks], dim=1)
        if bias is not None:
            logits = logits + widened(bias)
        capped = None if self.softcap is None else torch.tanh(logits / self.softcap)
        delta = torch.softmax(logits if capped is None or self.softcap is None else capped * self.softcap, dim=1)
        delta[torch.arange(len(labels), device=labels.device), labels] -= 1.0
        if capped is not None:
            delta = delta * (1.0 - capped.square())
        gradient = torch.zeros_like(hidden)
        for chunk in chunks:
            gradient += delta[:, chunk] @ widened(matrix[chunk])
        return gradient


@contextmanager
def capture(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record input and output of modules while the model runs inside the ``with``.

    Yields:
        A mapping that fills up: name to (input, output) of the module's last call.
    """
    captured: dict[str, tuple[Tensor, Tensor]] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            captured[name] = (args[0].detach(), output.detach())

        return record

    hooks = [model.get_submodule(name).register_forward_hook(recorder(name)) for name in names]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


def find_target(called: Sequence[str]) -> str:
    """The output projection of the last block's MLP, among the names of modules in the order in which they were called.

    Raises:
        UnknownTailError: no linear inside a stack of blocks has a name known for such projections.
    """
    for name in reversed(called):
        parts = name.split(".")
        if parts[-1] in _compat.MLP_OUTPUT_NAMES and any(part.isdigit() for part in parts):
            return name
    raise UnknownTailError(
        f"no layer inside a stack of blocks is called one of {_compat.MLP_OUTPUT_NAMES}; it calls {list(called)[-6:]}"
    )


def trace_tail(model: nn.Module, run: Callable[[], object], target: str | None = None) -> Tail:
    """Read a model's tail from one forward pass.

    Args:
        model: a causal language model.
        run: runs it once, on anything.
        target: name of the linear whose gradient is wanted; None: the last block's MLP output.

    Raises:
        UnknownTailError: the tail holds a layer whose Jacobian is not known here.
    """
    names = {module: name for name, module in model.named_modules()}
    called: list[tuple[str, nn.Module, int]] = []

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            called.append((names[module], module, args[0].shape[-1]))

    leaves = [module for module in names if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(record) for module in leaves]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()

    head = _compat.output_head(model)
    if head is None or head not in names:
        raise UnknownTailError("the model does not say which linear makes its logits (`get_output_embeddings`)")
    order = [name for name, _, _ in called]
    head_name = names[head]
    if not isinstance(head, nn.Linear) or order.count(head_name) != 1:
        raise UnknownTailError(f"its head `{head_name}` is not a linear that is called once")
    order = order[: order.index(head_name)]
    target = find_target([name for name in order if is_linear(model.get_submodule(name))]) if target is None else target
    if order.count(target) != 1 or not is_linear(model.get_submodule(target)):
        raise UnknownTailError(f"its `{target}` is not a linear that is called once")
    steps = []
    for name, module, size in called[order.index(target) + 1 : len(order)]:
        if isinstance(module, nn.Dropout | nn.Identity):
            continue  # the model is in eval mode
        steps.append(Projection(name) if is_linear(module) else _as_scaling(name, module, size))
    return Tail(target, tuple(steps), head_name, _compat.softcap(model))


def _as_scaling(name: str, module: nn.Module, size: int) -> Scaling:
    """Which normalising formula a module follows, found by trying it: class names promise nothing."""
    eps = _compat.norm_epsilon(module)
    if eps is not None:
        generator = torch.Generator().manual_seed(0)
        parameter = next(module.parameters(), torch.zeros(()))
        probe = torch.randn(4, size, generator=generator) * torch.tensor([[1.0], [0.1], [0.01], [10.0]]) + 0.3
        probe = probe.to(parameter)
        with torch.no_grad():
            actual = module(probe).float()
        close = 1e-4 if parameter.dtype in (torch.float32, torch.float64) else 3e-2
        bias = getattr(module, "bias", None)
        for centred, offset in ((False, 0.0), (False, 1.0), (True, 0.0), (True, 1.0)):
            scaling = Scaling(name, centred, offset, eps)
            x = probe.float()
            x = x - x.mean(dim=1, keepdim=True) if centred else x
            weight = getattr(module, "weight", None)
            gain = 1.0 if weight is None else weight.detach().float() + offset
            expected = x * (x.square().mean(dim=1, keepdim=True) + eps).rsqrt() * gain
            expected = expected if bias is None else expected + bias.detach().float()
            if (actual - expected).abs().max() <= close * expected.abs().max():
                return scaling
    raise UnknownTailError(f"its `{name}` ({type(module).__name__}) is neither a linear nor a known normalising layer")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, with its weight as it is or transposed."""
    return isinstance(module, nn.Linear) or _compat.is_conv1d(module)


def widened(tensor: Tensor) -> Tensor:
    """A tensor in float32; one in float64 stays as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _matrix(module: nn.Module) -> Tensor:
    """A linear's weight as ``[out, in]``."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if _compat.is_conv1d(module) else weight.detach()
