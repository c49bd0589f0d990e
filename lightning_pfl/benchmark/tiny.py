"""Tiny stand-ins that need no download: random language models of two families, a trivial tokenizer, drawn shapes.

They go through the same classes as the real ones, so that tests and a quick demo run the same code in seconds. Start at
`tiny_language_model` and `shape_tasks`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lightning_pfl.benchmark.batches import TaskData
from lightning_pfl.benchmark.features import FeatureStore, pool_tokens
from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.tasks import Example, Task, written_question
from lightning_pfl.benchmark.vlm import Projector, VisionLanguageModule, embedding_rms

_VOCABULARY = """
    <pad> <unk> <start> Answer : Choice list [ ] , ? . What Which colour shape has the thing is drawn
    red green blue yellow circle square triangle plus one two three four yes no
"""
_WORDS = tuple(_VOCABULARY.split())


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """One token per word or punctuation mark of a fixed list; anything else is unknown.

    Example:
        >>> tiny_tokenizer()(" red circle", add_special_tokens=False)["input_ids"]
        [21, 25]
    """
    vocabulary = {word: index for index, word in enumerate(_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<start>"
    )


def tiny_llama(*, hidden: int = 32, num_layers: int = 2, seed: int = 0) -> PreTrainedModel:
    """A random Llama of `num_layers` layers and width `hidden` (a multiple of 4), frozen, in float32."""
    config = LlamaConfig(
        vocab_size=len(_WORDS),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return _seeded(LlamaForCausalLM, config, seed)


def tiny_gemma(*, hidden: int = 48, num_layers: int = 3, seed: int = 0) -> PreTrainedModel:
    """A random Gemma 3 of `num_layers` layers and width `hidden` (a multiple of 4), frozen, in float32."""
    config = Gemma3TextConfig(
        vocab_size=len(_WORDS),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=hidden // 4,
        query_pre_attn_scalar=hidden // 4,
        sliding_window=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return _seeded(Gemma3ForCausalLM, config, seed)


@final
class PixelTokens:
    """A random but fixed encoder with the interface of `features.EfficientNetTokens` and no weights to fetch.

    Args:
        size: side in pixels.
        width: features per token.
        seed: of the random projection.
    """

    def __init__(self, *, size: int = 32, width: int = 64, seed: int = 0) -> None:
        self.name = f"pixels-{size}-{width}-{seed}"
        self.size = size
        self.width = width
        generator = torch.Generator().manual_seed(seed)
        self._kernel = torch.randn(width, 3, 4, 4, generator=generator) / 4

    def encode(self, pixels: Tensor) -> Tensor:
        """Map pixels [n, 3, size, size] to tokens [n, 5, width]: random 4 x 4 filters, rectified and pooled."""
        return pool_tokens(torch.nn.functional.conv2d(1 - pixels, self._kernel, stride=2).relu())


COLOURS = {"red": (210, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 210), "yellow": (230, 200, 40)}
SHAPES = ("circle", "square", "triangle", "plus")


def shape_tasks(
    folder: Path, *, backgrounds: Sequence[int] = (255, 170, 90), num_examples: int = 24, seed: int = 0
) -> tuple[Task, ...]:
    """Two families over drawn shapes, one task of each per background grey: what colour, and what shape?

    Args:
        folder: where the pictures are written, as 32-pixel PNG files.
        backgrounds: grey levels 0 to 255; each is a domain.
        num_examples: of training per task; validation and test have half as many.
        seed: of sizes and places.
    """
    tasks = []
    for family, choices in (("colour", tuple(COLOURS)), ("shape", SHAPES)):
        text = written_question(f"What {family} has the thing ?", choices)
        for background in backgrounds:
            name = f"{family}-{background}"
            sides: list[tuple[Example, ...]] = []
            for split, count in (("train", num_examples), ("val", num_examples // 2), ("test", num_examples // 2)):
                made = []
                for index in range(count):
                    rng = random.Random(f"{seed}/{name}/{split}/{index}")
                    answer = choices[index % len(choices)]
                    colour = answer if family == "colour" else rng.choice(tuple(COLOURS))
                    shape = answer if family == "shape" else rng.choice(SHAPES)
                    path = folder / name / f"{split}-{index}.png"
                    _draw(path, shape, COLOURS[colour], background, rng)
                    made.append(Example(f"{name}/{split}/{index}", (View(path),), text, answer, choices))
                sides.append(tuple(made))
            train, val, test = sides
            tasks.append(Task(name, family, train, val, test, licences=("CC0-1.0",)))
    return tuple(tasks)


def tiny_vlm(
    language_model: PreTrainedModel, *, width: int = 64, lr: float = 5e-3, seed: int = 0
) -> VisionLanguageModule:
    """The benchmark's module over a tiny language model, with a random frozen projector."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = Projector(width, language_model.config.hidden_size, embedding_rms(language_model))
    return VisionLanguageModule(language_model, projector, lr=lr)


def tiny_data(task: Task, folder: Path, *, batch_size: int = 8) -> TaskData:
    """The benchmark's data module over tiny pictures; features are kept below `folder`."""
    return TaskData(task, tiny_tokenizer(), FeatureStore(PixelTokens(), folder=folder), batch_size=batch_size)


def _seeded(kind: type[PreTrainedModel], config: LlamaConfig | Gemma3TextConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).requires_grad_(False).eval()


def _draw(path: Path, shape: str, colour: tuple[int, int, int], background: int, rng: random.Random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (32, 32), (background,) * 3)
    draw = ImageDraw.Draw(image)
    x, y, radius = rng.uniform(12, 20), rng.uniform(12, 20), rng.uniform(7, 11)
    if shape == "circle":
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    elif shape == "plus":
        draw.rectangle([x - radius, y - 2, x + radius, y + 2], fill=colour)
        draw.rectangle([x - 2, y - radius, x + 2, y + radius], fill=colour)
    else:
        draw.regular_polygon((x, y, radius), 3 if shape == "triangle" else 4, fill=colour)
    image.save(path)
