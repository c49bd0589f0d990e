"""Tiny models of every family that the adapters are tested on, with random weights from a fixed seed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 32
_TEXT = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": VOCABULARY, "eos_token_id": None, "pad_token_id": 0}
_GATED = {**_TEXT, "intermediate_size": 24, "num_key_value_heads": 2}


def _seeded(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    return build().eval()


def llama(depth: int = 4, **more) -> PreTrainedModel:
    return _seeded(lambda: LlamaForCausalLM(LlamaConfig(num_hidden_layers=depth, **{**_GATED, **more})))


def gemma3(depth: int = 4) -> PreTrainedModel:
    config = Gemma3TextConfig(num_hidden_layers=depth, head_dim=8, **_GATED)
    return _seeded(lambda: Gemma3ForCausalLM(config))


def qwen2(depth: int = 4) -> PreTrainedModel:
    return _seeded(lambda: Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=depth, **_GATED)))


def gpt2(depth: int = 4) -> PreTrainedModel:
    config = GPT2Config(n_embd=16, n_layer=depth, n_head=2, vocab_size=VOCABULARY, eos_token_id=None, bos_token_id=None)
    return _seeded(lambda: GPT2LMHeadModel(config))


def opt(depth: int = 4) -> PreTrainedModel:
    config = OPTConfig(ffn_dim=24, num_hidden_layers=depth, word_embed_proj_dim=16, **_TEXT)
    return _seeded(lambda: OPTForCausalLM(config))


def bert(depth: int = 4) -> PreTrainedModel:
    config = BertConfig(intermediate_size=24, num_hidden_layers=depth, **_TEXT)
    return _seeded(lambda: BertForSequenceClassification(config))


def vit(depth: int = 4) -> PreTrainedModel:
    config = ViTConfig(
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=24,
        num_hidden_layers=depth,
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=0.0,
    )
    return _seeded(lambda: ViTForImageClassification(config))


def mlp() -> nn.Sequential:
    """Four hidden layers and a head."""
    torch.manual_seed(0)
    widths = [8, 8, 8, 8]
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 3)).eval()


FAMILIES = {"llama": llama, "gemma3": gemma3, "qwen2": qwen2, "gpt2": gpt2, "opt": opt, "bert": bert, "vit": vit}
CAUSAL = ("llama", "gemma3", "qwen2", "gpt2", "opt")


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """Something that the model takes."""
    generator = torch.Generator().manual_seed(1)
    if getattr(model, "main_input_name", None) == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator).to(next(model.parameters()).dtype)}
    if isinstance(model, nn.Sequential):
        return {"input": torch.randn(2, 8, generator=generator).to(next(model.parameters()).dtype)}
    return {"input_ids": torch.randint(1, VOCABULARY, (2, 6), generator=generator)}


def output(model: nn.Module) -> Tensor:
    """The model's logits for `inputs`, without a graph."""
    with torch.no_grad():
        found = model(**inputs(model.get_base_model() if isinstance(model, PeftModel) else model))
    return found if isinstance(found, Tensor) else found.logits


def scramble(model: nn.Module, seed: int = 5, scale: float = 0.3) -> None:
    """Random numbers into everything that adapters train or receive, as if they had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            is_frozen_basis = "colora_basis" in name or "colora_aligned" in name
            if ".colora_" in f".{name}" and not is_frozen_basis:
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
