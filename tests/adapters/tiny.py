"""Tiny models of every family that the adapters are tested on, with random weights from a fixed seed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
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
    return _seeded(
        lambda: Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=depth, **{**_GATED, "num_key_value_heads": 1}))
    )


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


def phi(depth: int = 4) -> PreTrainedModel:
    config = PhiConfig(intermediate_size=24, num_hidden_layers=depth, **_TEXT)
    return _seeded(lambda: PhiForCausalLM(config))


def t5(depth: int = 4) -> PreTrainedModel:
    config = T5Config(
        d_model=16,
        d_ff=24,
        d_kv=8,
        num_heads=2,
        num_layers=depth,
        vocab_size=VOCABULARY,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        eos_token_id=None,
        initializer_factor=0.5,
    )
    return _seeded(lambda: T5ForConditionalGeneration(config))


def whisper(depth: int = 4) -> PreTrainedModel:
    config = WhisperConfig(
        d_model=16,
        encoder_layers=depth,
        decoder_layers=depth,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=16,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return _seeded(lambda: WhisperForConditionalGeneration(config))


_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
_VISION = {**_TOWER, "image_size": 16, "patch_size": 8}


def clip(depth: int = 4) -> PreTrainedModel:
    text = {"num_hidden_layers": depth, "vocab_size": VOCABULARY, "max_position_embeddings": 16, **_TOWER}
    vision = {"num_hidden_layers": depth, **_VISION}
    return _seeded(lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)))


def llava(depth: int = 4) -> PreTrainedModel:
    """The vision tower is longer than the language model."""
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "num_hidden_layers": depth + 2, **_VISION},
        text_config={"model_type": "llama", "num_hidden_layers": depth, **_GATED},
        image_token_index=VOCABULARY - 1,
        image_token_id=VOCABULARY - 1,
    )
    return _seeded(lambda: LlavaForConditionalGeneration(config))


def resnet(depth: int = 4, layer_type: str = "bottleneck") -> PreTrainedModel:
    """Two stages of other widths; a bottleneck's kernels are 1, 3 and 1 wide."""
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[depth - depth // 2, depth // 2], layer_type=layer_type
    )
    return _seeded(lambda: ResNetForImageClassification(config))


def convnext(depth: int = 4) -> PreTrainedModel:
    config = ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[depth - depth // 2, depth // 2], patch_size=2)
    return _seeded(lambda: ConvNextForImageClassification(config))


def efficientnet(depth: int = 4) -> PreTrainedModel:
    config = EfficientNetConfig(
        in_channels=[32, 16],
        out_channels=[16, 24],
        kernel_sizes=[3, 5],
        strides=[1, 2],
        num_block_repeats=[depth - depth // 2, depth // 2],
        expand_ratios=[2, 2],
        depthwise_padding=[],
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        image_size=16,
    )
    return _seeded(lambda: EfficientNetForImageClassification(config))


def mlp() -> nn.Sequential:
    """Four hidden layers and a head."""
    torch.manual_seed(0)
    widths = [8, 8, 8, 8]
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 3)).eval()


def mlp_of_another_shape() -> nn.Sequential:
    """Two hidden layers, one of them wider."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


CAUSAL = {"llama": llama, "gemma3": gemma3, "qwen2": qwen2, "gpt2": gpt2, "opt": opt, "phi": phi}
ENCODER_DECODERS = {"t5": t5, "whisper": whisper}
CONVOLUTIONAL = {"resnet": resnet, "convnext": convnext, "efficientnet": efficientnet}
FAMILIES = {**CAUSAL, **ENCODER_DECODERS, "bert": bert, "vit": vit, "clip": clip, "llava": llava, **CONVOLUTIONAL}
BLOCKS = {
    "t5": {"encoder": "encoder.block", "decoder": "decoder.block"},
    "whisper": {"encoder": "encoder.layers", "decoder": "decoder.layers"},
    "clip": {"text": "text_model.encoder.layers", "vision": "vision_model.encoder.layers"},
}
"""What must be said of models with two towers: the same names for all of them."""


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """Something that the model takes."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if isinstance(model, nn.Sequential):
        return {"input": torch.randn(2, 8, generator=generator).to(dtype)}
    ids = torch.randint(1, VOCABULARY - 1, (2, 6), generator=generator)
    pixels = torch.randn(2, 3, 16, 16, generator=generator).to(dtype)
    kind = type(model).__name__
    if kind.startswith(("CLIP", "Siglip")):
        return {"input_ids": ids, "pixel_values": pixels}
    if kind.startswith("Llava"):
        ids[:, :4] = VOCABULARY - 1  # where the four patches go
        return {"input_ids": ids, "pixel_values": pixels}
    if kind.startswith("Whisper"):
        features = torch.randn(2, 8, 16, generator=generator).to(dtype)
        return {"input_features": features, "decoder_input_ids": ids[:, :4]}
    if kind.startswith("T5"):
        return {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    return {"pixel_values": pixels} if model.main_input_name == "pixel_values" else {"input_ids": ids}


def output(model: nn.Module) -> Tensor:
    """The model's logits for `inputs`, without a graph."""
    with torch.no_grad():
        found = model(**inputs(model.get_base_model() if isinstance(model, PeftModel) else model))
    return scores(found)


def scores(found: object) -> Tensor:
    """The logits in what a model returned."""
    if isinstance(found, Tensor):
        return found
    return found.logits if hasattr(found, "logits") else found.logits_per_image


def scramble(model: nn.Module, seed: int = 5, scale: float = 0.3) -> None:
    """Random numbers into everything that adapters train or receive, as if they had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            is_frozen_basis = "colora_basis" in name or "colora_aligned" in name
            if ".colora_" in f".{name}" and not is_frozen_basis:
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
