"""`prompt_states`: what a frozen causal language model has made of each question, as one vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pfl.relevance import _compat

__all__ = ["pooled", "prompt_states"]

_IGNORED = -100
_EPS = 1e-12  # added to the mean square: a state of zeros stays one


def prompt_states(model: nn.Module, within: str, batch: Mapping[str, Any]) -> Tensor:
    """The mean over a question's positions of the states that enter the last block, each at root mean square 1.

    Without that scaling two or three coordinates, and the first position, would be all that is seen: some states of
    language models are a hundred times as large as the rest. Nothing of the block itself, nor what comes after it, is
    computed. A position's state depends on no later one, so an answer in the batch is not seen.

    Args:
        model: frozen, in evaluation mode.
        within: name of any layer of the last block.
        batch: what the model takes, as in `CausalLMProbe`; positions where ``attention_mask`` is 0, and from the first
            one on whose ``labels`` are not -100, do not count.

    Returns:
        float32, shape ``[n, hidden]``, on the CPU; zeros where no position counts.

    Raises:
        ValueError: the layer is in no block.
    """
    parts = within.split(".")
    place = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if place is None:
        raise ValueError(
            f"Questions are read where they enter a model's last block, but `{within}` is part of no numbered block. "
            "Write a `Reader` of your own for such a model."
        )
    parameter = next(model.parameters())
    inputs = {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in batch.items()
        if name != "labels"
    }
    states: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        states.append((args[0] if args else named["hidden_states"]).detach())
        raise _SeenEnough

    handle = model.get_submodule(".".join(parts[: place + 1])).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**inputs, **_compat.keyword_arguments(model))
    except _SeenEnough:
        pass
    finally:
        handle.remove()
    return pooled(states[0], _counted(batch, states[0])).cpu()


def pooled(states: Tensor, counted: Tensor) -> Tensor:
    """The mean over the positions that count, each scaled to root mean square 1.

    Args:
        states: ``[n, t, d]``.
        counted: 1 where a position counts, else 0; ``[n, t]``.

    Returns:
        float32, shape ``[n, d]``; zeros where no position counts.

    Example:
        >>> pooled(torch.tensor([[[3.0, 3.0], [0.5, -0.5], [7.0, 7.0]]]), torch.tensor([[1.0, 1.0, 0.0]]))
        tensor([[1., 0.]])
    """
    scaled = states.float() * (states.float().square().mean(dim=-1, keepdim=True) + _EPS).rsqrt()
    weights = counted.to(scaled.device).unsqueeze(-1)
    return (scaled * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def _counted(batch: Mapping[str, Any], entered: Tensor) -> Tensor:
    """Which positions belong to the question, float ``[n, t]``."""
    counted = torch.ones(entered.shape[:2])
    if isinstance(mask := batch.get("attention_mask"), Tensor):
        counted = counted * mask.cpu()
    if isinstance(labels := batch.get("labels"), Tensor):
        counted = counted * (labels.cpu() != _IGNORED).cumsum(dim=1).eq(0)
    return counted


class _SeenEnough(Exception):
    """Leaves a forward pass at the block that is read."""
