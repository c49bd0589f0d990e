"""A LLaVA of two times two layers with its processor, as `save_pretrained` writes them: nothing is downloaded."""

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from lightning_pfl.benchmark.tiny import tiny_tokenizer

_TURN_ENDS = "{% if m['role'] == 'assistant' %}<end>{% endif %}{{ '\\n' }}{% endfor %}"
_GENERATE = "{% if add_generation_prompt %}assistant : {% endif %}"
PARTS = (
    "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}" + _TURN_ENDS + _GENERATE
)
TEXT = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}" + _TURN_ENDS + _GENERATE


def processor(chat_template=PARTS):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["user", "assistant"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "eos_token": "<end>"})
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer, patch_size=16, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=chat_template, image_token="<image>",
    )  # fmt: skip


def model(vocabulary):
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=16
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=None,
        eos_token_id=vocabulary.convert_tokens_to_ids("<end>"),
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=vocabulary.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1, image_seq_length=4,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).eval()


def save(folder):
    made = processor()
    made.save_pretrained(folder)
    model(made.tokenizer).save_pretrained(folder)
    return str(folder)
