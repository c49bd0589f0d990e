"""Aligning the demo's models on public captions: every model names the same pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pfl.adapters import CoLoraConfig, inject
from lightning_pfl.adapters.alignment import Alignment, align
from lightning_pfl.adapters.contrasts import draw_contrast
from lightning_pfl.adapters.readings import Reading
from lightning_pfl.benchmark.batches import IMAGE_ID
from lightning_pfl.benchmark.features import TOKENS_PER_IMAGE, FeatureStore
from lightning_pfl.benchmark.projector import PROMPT, Caption
from lightning_pfl.benchmark.vlm import VisionLanguageModule

__all__ = ["align_on_captions", "caption_readings"]

_BATCH = 16


def align_on_captions(
    modules: Mapping[str, VisionLanguageModule],
    tokenizers: Mapping[str, Any],
    store: FeatureStore,
    captions: Sequence[Caption],
    words: Mapping[str, Tensor],
    *,
    anchor: str,
    config: CoLoraConfig,
) -> Alignment:
    """Align the Co-LoRA layers of several models to one of them.

    Args:
        modules: by key; adapters are injected into them.
        tokenizers: by key.
        store: gives the pictures' features.
        captions: public pictures with names.
        words: tokens of the words that models are asked to weigh against each other, by key, from `shared_words`.
        anchor: key of the model that the others are compared with.
        config: of the adapters, the same for all.

    Returns:
        The alignment, by base identity.
    """
    for module in modules.values():
        inject(module, config)
    records = caption_readings(tokenizers, store, captions, words)
    return align(modules, records, anchor=anchor, loss=_prefers)


def caption_readings(
    tokenizers: Mapping[str, Any], store: FeatureStore, captions: Sequence[Caption], words: Mapping[str, Tensor]
) -> list[dict[str, Reading]]:
    """Pictures with the start of a caption, as each model reads them, and two words to weigh for each.

    A visual token's place is its cell, a word's place where it ends.

    Args:
        tokenizers: by key of a model.
        store: gives the pictures' features.
        captions: pictures; their names are not used.
        words: by key, tokens of the same words in each vocabulary.

    Returns:
        Records of 16 pictures, the last one shorter, as `align` takes them.
    """
    records = []
    for start in range(0, len(captions), _BATCH):
        rows = range(start, min(start + _BATCH, len(captions)))
        drawn = [draw_contrast(words, row) for row in rows]
        features = store.tokens([captions[row].view for row in rows])
        records.append(
            {
                key: _reading(tokenizer, features, torch.cat([pair[key] for pair in drawn]))
                for key, tokenizer in tokenizers.items()
            }
        )
    return records


def _reading(tokenizer: Any, features: Tensor, contrast: Tensor) -> Reading:
    start = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    words = tokenizer(PROMPT, add_special_tokens=False, return_offsets_mapping=True)
    image = range(1, TOKENS_PER_IMAGE + 1)
    ids = torch.tensor([*start, *[IMAGE_ID] * TOKENS_PER_IMAGE, *words["input_ids"]])
    ends = [TOKENS_PER_IMAGE + end if end > begin else -1 for begin, end in words["offset_mapping"]]
    places = torch.tensor([*[-1] * len(start), *image, *ends])
    count = len(features)
    return Reading(
        {
            "features": features,
            "input_ids": ids.expand(count, -1),
            "attention_mask": torch.ones(count, len(ids), dtype=torch.long),
            "option_ids": contrast,
        },
        places.expand(count, -1),
    )


def _prefers(module: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """By how much the model prefers the first of two words to the second after each picture, summed."""
    scores = module(dict(inputs))
    preferred: Tensor = (scores[:, 0] - scores[:, 1]).sum()
    return preferred
