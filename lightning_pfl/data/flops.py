"""How much a training step costs, and how many steps each method may take so that all compute alike.

Start at `matched_steps`. `measured_cost` runs a step once and counts its products as they happen, whatever the method
does; `estimated_cost` reads shapes only and is for models that are too large to run where the comparison is planned.
Both count multiplications and additions of matrix products (a multiply-add is two), which is all that matters for a
transformer; elementwise work (norms, activations, a static gate, mixing P) is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from lightning_pfl.adapters import CoLoraLayer

__all__ = ["StepCost", "estimated_cost", "matched_steps", "measured_cost"]


@dataclass(frozen=True)
class StepCost:
    """Floating-point operations of one optimizer step of one client.

    Attributes:
        forward: of the model with its adapters and gates.
        backward: through it, weights' gradients included.
        probe: of one sketch of the client's task, every ``probe_every``-th step.
        probe_every: F; a sketch is made at step 0, F, 2 F, ...
    """

    forward: int
    backward: int = 0
    probe: int = 0
    probe_every: int = 1

    def of_round(self, num_steps: int) -> int:
        """What a round of so many steps costs.

        Example:
            >>> StepCost(forward=10, backward=20, probe=7, probe_every=4).of_round(6)  # 6 * 30 + 2 * 7
            194
        """
        return num_steps * (self.forward + self.backward) + math.ceil(num_steps / self.probe_every) * self.probe


def matched_steps(cost: StepCost, *, reference: StepCost, reference_steps: int) -> int:
    """How many steps of one method cost at most what ``reference_steps`` of another do.

    Raises:
        ValueError: not even one step fits.

    Source:
        Co-LoRA (arXiv:2506.11024) compares methods so: on DRAKE 94 steps of its own against 100 of plain fine-tuning.
        Its numbers come from elsewhere; here they follow from the model and the method.

    Example:
        >>> plain = StepCost(forward=100, backward=200)
        >>> ours = StepCost(forward=110, backward=205, probe=40, probe_every=10)
        >>> matched_steps(ours, reference=plain, reference_steps=100)  # 93 * 315 + 10 * 40 <= 30,000
        93
    """
    budget = reference.of_round(reference_steps)
    steps = budget // max(cost.forward + cost.backward, 1)
    while steps and cost.of_round(steps) > budget:
        steps -= 1
    if not steps:
        raise ValueError(f"A round of {budget:,} operations has no room for a step of {cost.of_round(1):,}.")
    return steps


def measured_cost(
    loss: Callable[[], Tensor], *, probe: Callable[[], Any] | None = None, probe_every: int = 1
) -> StepCost:
    """Run a step's forward and backward pass and count.

    Args:
        loss: computes the training loss of one batch, such as ``lambda: module.training_step(batch, 0)``; several
            forward passes in it count all. Gradients that it leaves behind are the caller's to clear.
        probe: makes one sketch.
        probe_every: every how many steps.

    Returns:
        The cost. Fused attention kernels count two products per head forward and five backward, on every device.

    Example:
        >>> layer, x = nn.Linear(3, 5, bias=False), torch.randn(2, 3)
        >>> measured_cost(lambda: layer(x).sum())  # 2 * 2 * 3 * 5, and as much for the weight's gradient
        StepCost(forward=60, backward=60, probe=0, probe_every=1)
    """
    with torch.enable_grad():
        forward, value = _counted(loss)
        backward, _ = _counted(value.backward)
    sketch = 0 if probe is None else _counted(probe)[0]
    return StepCost(forward, backward, sketch, probe_every)


def estimated_cost(
    module: nn.Module,
    *,
    num_tokens: int,
    tokens_of: Mapping[str, int] | None = None,
    sequence_length: int = 0,
    inputs_require_grad: bool = False,
) -> StepCost:
    r"""Count a step of a model made of linear layers from their shapes alone.

    A linear layer costs :math:`2 n d_{in} d_{out}` forward; as much backward for the gradient of its input, if anything
    trained stands before it, and as much again if its own weight is trained. A Co-LoRA layer adds A and B once and P
    once (twice under a gate that reads the input), a conventional one A and B of each branch. Layers count in the order
    in which they were registered, which in a decoder is the order of computation.

    Args:
        module: with or without adapters. Nothing is computed; parameters may be on the meta device.
        num_tokens: n, tokens of a step in all sequences together.
        tokens_of: another number for submodules by name, the longest name that fits: ``{"lm_head": 4}`` where few
            logits are computed, ``{"model.vision_tower": 577}``; 0 for one that does not run.
        sequence_length: T of each sequence, for attention: :math:`4 n T h` per attention of width h forward and
            :math:`10 n T h` backward, as torch counts its fused kernels. 0 leaves attention out.
        inputs_require_grad: what goes into the first layer depends on something that is trained.

    Returns:
        The cost, without a probe: the forward cost of the probe's own model, times the examples of a sketch, is the
        probe's. Convolutions and embeddings are not counted.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
        >>> _ = mlp[0].requires_grad_(False)
        >>> estimated_cost(mlp, num_tokens=2)  # forward 60 + 140; backward 140, for the second weight
        StepCost(forward=200, backward=140, probe=0, probe_every=1)
    """
    forward = backward = 0
    # does a gradient flow into the layer's input?
    reached = inputs_require_grad or any(
        one.weight.requires_grad for one in module.modules() if isinstance(one, nn.Embedding)
    )
    parent, waiting = "", False
    for name, layer in _layers(module):
        owner, _, role = name.rpartition(".")
        if waiting and not (owner == parent and role in _SIDE_BY_SIDE):
            reached, waiting = True, False
        tokens = _tokens(name, num_tokens, tokens_of or {})
        there, back = _layer_cost(layer, tokens, reached)
        forward, backward = forward + there, backward + back
        trains = any(parameter.requires_grad for parameter in layer.parameters())
        if tokens and trains:
            waiting, parent = True, owner
        if role == "o_proj":  # what goes into it comes out of an attention of its width
            once = 4 * tokens * sequence_length * _widths(layer)[0]
            forward += once
            backward += once * 5 // 2 if reached else 0
    return StepCost(forward, backward)


_SIDE_BY_SIDE = frozenset({"k_proj", "v_proj", "up_proj"})
"""Roles that read the same input as the layer registered before them."""


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers with what wraps them, outermost only, in order."""
    inside: str | None = None
    for name, layer in module.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside = None
        if isinstance(layer, (CoLoraLayer, nn.Linear, Conv1D)):
            inside = f"{name}."
            yield name, layer


def _layer_cost(layer: nn.Module, tokens: int, reached: bool) -> tuple[int, int]:
    """Forward and backward products of one layer."""
    base = layer.get_base_layer() if isinstance(layer, CoLoraLayer) else layer
    wide, narrow = _widths(layer)
    once = 2 * tokens * wide * narrow
    weight: Tensor = base.weight  # type: ignore[assignment]
    forward, backward = once, once * (reached + weight.requires_grad)
    if isinstance(layer, CoLoraLayer):
        for adapter in layer.active_adapters:
            if adapter in layer.colora_address:
                there, back = _adapter_cost(layer, adapter, tokens, reached)
                forward, backward = forward + there, backward + back
    return forward, backward


def _adapter_cost(layer: CoLoraLayer, adapter: str, tokens: int, reached: bool) -> tuple[int, int]:
    wide, narrow = _widths(layer)
    rank = layer.colora_config[adapter].r
    gated = layer.has_global_branch(adapter)
    by_sample = gated and layer.colora_config[adapter].gate.reads_input
    if layer.colora_address[adapter] is None:
        rank = 2 * rank if gated else rank
        down, up = 2 * tokens * wide * rank, 2 * tokens * narrow * rank
        return down + up, down + up + up + (down if reached else 0)  # G's weights are stacked with L's, which train
    down, up = 2 * tokens * wide * rank, 2 * tokens * narrow * rank
    inner = 2 * tokens * rank * rank
    branches = 2 if by_sample else 1
    backward = up + inner + (down + branches * inner if reached else 0)
    return down + up + branches * inner, backward


def _widths(layer: nn.Module) -> tuple[int, int]:
    """Numbers that go in and that come out."""
    if isinstance(layer, CoLoraLayer):
        return layer.in_features, layer.out_features
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return (weight.shape[0], weight.shape[1]) if isinstance(layer, Conv1D) else (weight.shape[1], weight.shape[0])


def _tokens(name: str, default: int, tokens_of: Mapping[str, int]) -> int:
    fitting = [prefix for prefix in tokens_of if name == prefix or name.startswith(f"{prefix}.")]
    return tokens_of[max(fitting, key=len)] if fitting else default


def _counted(function: Callable[[], Any]) -> tuple[int, Any]:
    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
    with counter:
        result = function()
    return int(counter.get_total_flops()), result


def _attention_forward(query: Sequence[int], key: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Two products per head; torch's own formula refuses keys that are shared by several heads."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * width


def _attention_backward(
    gradient: Sequence[int], query: Sequence[int], key: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    return _attention_forward(query, key) * 5 // 2


_OPS = torch.ops.aten
_ATTENTION = {
    _OPS._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    _OPS._scaled_dot_product_flash_attention: _attention_forward,
    _OPS._scaled_dot_product_efficient_attention: _attention_forward,
    _OPS._scaled_dot_product_cudnn_attention: _attention_forward,
    _OPS._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _OPS._scaled_dot_product_flash_attention_backward: _attention_backward,
    _OPS._scaled_dot_product_efficient_attention_backward: _attention_backward,
    _OPS._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}
