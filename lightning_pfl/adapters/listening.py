"""Who tells a gate's context of the passes through a model: hooks on the transformers models around each layer.

Start at `connect`. Which positions a context then reads is decided in `lightning_pfl.adapters.prompts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lightning_pfl.adapters.prompts import PromptContext
from lightning_pfl.adapters.roles import known_role
from lightning_pfl.adapters.stacks import output_embeddings

__all__ = ["connect"]

_FROM_ENCODER = ("cross_k", "cross_v", "cross_kv")


def connect(module: nn.Module) -> None:
    """Give the adapted layers of each transformers model in a module one context, told by hooks; again does nothing.

    The two sequences of an encoder-decoder model have a context each, and the keys and values of its cross-attention,
    which are given the encoder's output in a pass of the decoder, have a third.
    """
    models = {name: child for name, child in module.named_modules() if isinstance(child, PreTrainedModel)}
    layers = {name: child for name, child in module.named_modules() if getattr(child, "is_colora", False)}
    for name, layer in layers.items():
        chain = [model for prefix, model in models.items() if not prefix or name.startswith(f"{prefix}.")]
        if chain and (context := _context(name, layer, chain)) is not None:
            layer.colora_context = context


def _context(name: str, layer: Any, chain: Sequence[PreTrainedModel]) -> PromptContext | None:
    """The context of a layer, given the models around it, outermost first; None for one that reads all it is given."""
    pair = next((index for index in reversed(range(len(chain))) if _is_pair(chain[index])), None)
    if pair is not None:
        below = chain[pair + 1 :]
        if not any(model is chain[pair].get_encoder() for model in below):
            return _decoder_context(name, layer, chain[: pair + 1], below)
        chain = below
    if _joins_towers(chain[-1]) and not any(output_embeddings(model) is layer.get_base_layer() for model in chain):
        return None  # it carries what one tower has read over to another
    # a vision tower inside a language model reads another input
    chain = [model for model in chain if model.main_input_name == chain[-1].main_input_name]
    context = getattr(chain[-1], "colora_context", None)
    if context is None:
        context = PromptContext(any(getattr(child, "is_causal", False) is True for child in chain[-1].modules()))
    for model in chain:
        _tell(model, context)
    return context


def _decoder_context(
    name: str, layer: Any, around: Sequence[PreTrainedModel], below: Sequence[PreTrainedModel]
) -> PromptContext:
    """The context of a layer in the decoder of an encoder-decoder model, or behind it (a head)."""
    inner = below or [around[-1].get_decoder()]
    roles = next(iter(layer.colora_config.values())).roles
    if known_role(name, roles) in _FROM_ENCODER:
        cross = getattr(inner[0], "colora_cross_context", None)
        if cross is None:
            cross = PromptContext(tokens=("encoder_hidden_states",), attended="encoder_attention_mask")
            inner[0].colora_cross_context = cross
            _hook(inner[0], cross)
        return cross
    context = getattr(inner[0], "colora_context", None) or PromptContext(is_causal=True, follows=True)
    for model in around:
        if not hasattr(model, "colora_context"):
            model.colora_context = context
            model.register_forward_pre_hook(_Tell(context).around)
            model.register_forward_hook(_Tell(context).after, always_call=True)
    for model in inner:
        _tell(model, context)
    return context


def _is_pair(model: PreTrainedModel) -> bool:
    """Whether a model consists of an encoder and a decoder (parts of one may carry its config too)."""
    inner = any(isinstance(child, PreTrainedModel) and child is not model for child in model.modules())
    return inner and bool(getattr(model.config, "is_encoder_decoder", False))


def _joins_towers(model: PreTrainedModel) -> bool:
    """Whether the models inside a model read inputs of several kinds."""
    inner = [child for child in model.modules() if isinstance(child, PreTrainedModel) and child is not model]
    return len({child.main_input_name for child in inner}) > 1


def _tell(model: PreTrainedModel, context: PromptContext) -> None:
    if not hasattr(model, "colora_context"):
        model.colora_context = context
        _hook(model, context)


def _hook(model: PreTrainedModel, context: PromptContext) -> None:
    model.register_forward_pre_hook(_Tell(context).before, with_kwargs=True)
    model.register_forward_hook(_Tell(context).after, always_call=True)


class _Tell:
    """The hooks that tell a context of a model's calls, before and after."""

    def __init__(self, context: PromptContext) -> None:
        self.context = context

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.context.begin(model, args, kwargs)

    def around(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self.context.begin_around()

    def after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.context.end(output)
