"""The last layer of a decoder for its last position alone, which is where answers are read.

Start at `last_state`. All positions bear on the last one through keys and values only; queries, the output projection
and the perceptron of the others say nothing of the answer. Leaving them out gives the same numbers and gradients in a
fraction of the time.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_pfl.adapters import CoLoraLayer

__all__ = ["ends_in_one_layer", "last_state"]


def ends_in_one_layer(body: nn.Module) -> bool:
    """Whether `last_state` may stand in for a body: one decoder layer, no gate in it that reads its whole input.

    Args:
        body: a language model without its head.
    """
    layers: Any = getattr(body, "layers", ())
    if len(layers) != 1 or not hasattr(layers[0], "self_attn"):
        return False
    return not any(
        layer.has_global_branch(adapter) and layer.colora_config[adapter].gate.reads_input
        for layer in layers[0].modules()
        if isinstance(layer, CoLoraLayer)
        for adapter in layer.colora_address
    )


def last_state(body: Any, states: Tensor, mask: Tensor) -> Tensor:
    """A one-layer body's output at the last position.

    Args:
        body: Llama's or Gemma 3's decoder, or one built like them, for which `ends_in_one_layer` holds.
        states: what enters the layer, ``[b, t, hidden]``, padded on the left.
        mask: ``[b, t]``, 0 on padding.

    Returns:
        ``[b, hidden]``, after the final norm.
    """
    layer = body.layers[0]
    window = getattr(layer.self_attn, "sliding_window", None)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    seen = mask.bool()
    if window is not None:
        seen = seen & (positions > positions[:, -1:] - window)
    hidden = torch.finfo(states.dtype).min * (~seen).to(states.dtype)
    before = _Before(body, layer, states[:, :-1], positions[:, :-1])
    output = body(
        inputs_embeds=states[:, -1:],
        attention_mask=_by_kind(body, hidden[:, None, None]),
        position_ids=positions[:, -1:],
        past_key_values=before,
        use_cache=False,
    )
    last: Tensor = output.last_hidden_state[:, -1]
    return last


@final
class _Before:
    """Keys and values of all positions but the last, in the place of a cache of past ones; gradients pass through."""

    def __init__(self, body: Any, layer: Any, states: Tensor, positions: Tensor) -> None:
        attention = layer.self_attn
        entering = layer.input_layernorm(states)
        shape = (*entering.shape[:2], -1, attention.head_dim)
        keys = attention.k_proj(entering).view(shape).transpose(1, 2)
        self._values = attention.v_proj(entering).view(shape).transpose(1, 2)
        if hasattr(attention, "k_norm"):
            keys = attention.k_norm(keys)
        kind = getattr(attention, "layer_type", None)
        turned = body.rotary_emb(states, positions) if kind is None else body.rotary_emb(states, positions, kind)
        cosine, sine = (part[:, None] for part in turned)
        first, second = keys.chunk(2, dim=-1)
        self._keys = keys * cosine + torch.cat([-second, first], dim=-1) * sine

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, those of the last position being told."""
        return torch.cat([self._keys, keys], dim=2), torch.cat([self._values, values], dim=2)


def _by_kind(body: Any, mask: Tensor) -> Any:
    """The mask as the body takes a prepared one: as it is, or per kind of attention where there are several."""
    kinds = getattr(body.config, "layer_types", None)
    return mask if kinds is None else {kind: mask for kind in ("full_attention", "sliding_attention")}
