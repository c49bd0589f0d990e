"""The only place of this room that touches private names of transformers (read in 5.23).

`forget_gguf`: a model that transformers read from a GGUF file stays flagged as quantized although its weights are plain
tensors; `save_pretrained` then refuses it. `plain_attention`: which kernel a model attends with stands in its config.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def forget_gguf(model: PreTrainedModel) -> None:
    """Take the quantization flags off a model whose weights were dequantized while loading."""
    model.hf_quantizer = None
    model.quantization_method = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def keep_first_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Cut a decoder to its first layers in place; the final norm and the head stay."""
    body = model.model
    body.layers = body.layers[:num_layers]
    model.config.num_hidden_layers = num_layers
    if getattr(model.config, "layer_types", None) is not None:
        model.config.layer_types = list(model.config.layer_types[:num_layers])


def keep_last_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Cut a decoder to its last layers in place: it then goes on from the states that enter the first of them."""
    body = model.model
    body.layers = body.layers[-num_layers:]
    model.config.num_hidden_layers = num_layers
    if getattr(model.config, "layer_types", None) is not None:
        model.config.layer_types = list(model.config.layer_types[-num_layers:])


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attend by plain matrix products meanwhile: on short prompts a CPU's fused kernel has a slow backward pass."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def keep_rows(model: PreTrainedModel, ids: Tensor) -> None:
    """Cut embedding and head, which may be one tensor, to some tokens' rows in place."""
    whole: Any = model
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    rows = nn.Parameter(embedding.weight.detach()[ids].clone(), requires_grad=False)
    is_tied = head.weight is embedding.weight
    last = rows if is_tied else nn.Parameter(head.weight.detach()[ids].clone(), requires_grad=False)
    embedding.weight, head.weight = rows, last
    embedding.num_embeddings = head.out_features = len(ids)
    embedding.padding_idx = None
    whole.config.vocab_size = whole.vocab_size = whole.model.vocab_size = len(ids)
