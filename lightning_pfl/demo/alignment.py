"""Aligning the demo's models on public pictures: every model is asked the same about the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pfl.adapters import CoLoraConfig, inject
from lightning_pfl.adapters.alignment import Alignment, align
from lightning_pfl.adapters.contrasts import draw_contrast
from lightning_pfl.adapters.readings import Reading
from lightning_pfl.adapters.rules import Rule
from lightning_pfl.benchmark.batches import ANSWER, IMAGE_ID, start_id
from lightning_pfl.benchmark.features import TOKENS_PER_IMAGE, FeatureStore
from lightning_pfl.benchmark.public import QUESTIONS, Caption
from lightning_pfl.benchmark.vlm import VisionLanguageModule

__all__ = ["align_on_pictures", "picture_readings"]

_BATCH = 32


def align_on_pictures(
    modules: Mapping[str, VisionLanguageModule],
    readings: Sequence[Mapping[str, Reading]],
    *,
    anchor: str,
    config: CoLoraConfig,
    rule: Rule[Any] | None = None,
) -> Alignment:
    """Align the Co-LoRA layers of several models to one of them.

    Args:
        modules: by key; adapters are injected into them.
        readings: from `picture_readings`.
        anchor: key of the model that the others are compared with.
        config: of the adapters, the same for all.
        rule: as of `align`.

    Returns:
        The alignment, by base identity.
    """
    for module in modules.values():
        inject(module, config)
    return align(modules, readings, anchor=anchor, rule=rule, loss=_prefers)


def picture_readings(
    tokenizers: Mapping[str, Any], store: FeatureStore, captions: Sequence[Caption], words: Mapping[str, Tensor]
) -> list[dict[str, Reading]]:
    """Pictures after a public question, as each model reads them, and two words to weigh as the answer to each.

    All pictures of a record answer one question, so that what varies at a place is the picture. A word's place is the
    character where it ends, a visual token's its cell.

    Args:
        tokenizers: by key of a model.
        store: gives the pictures' features.
        captions: pictures; their names are not used.
        words: by key, tokens of the same words in each vocabulary.

    Returns:
        Records of 32 pictures, the last one shorter, as `align` takes them.
    """
    records = []
    for number, start in enumerate(range(0, len(captions), _BATCH)):
        rows = range(start, min(start + _BATCH, len(captions)))
        drawn = [draw_contrast(words, row) for row in rows]
        features = store.tokens([captions[row].view for row in rows])
        question = QUESTIONS[number % len(QUESTIONS)]
        records.append(
            {
                key: _reading(tokenizer, question, features, torch.cat([pair[key] for pair in drawn]))
                for key, tokenizer in tokenizers.items()
            }
        )
    return records


def _reading(tokenizer: Any, question: str, features: Tensor, contrast: Tensor) -> Reading:
    """The layout of `prompt_ids`, with places."""
    asked, asked_places = _words(tokenizer, question, after=0)
    answer, answer_places = _words(tokenizer, ANSWER, after=len(question) + TOKENS_PER_IMAGE)
    image_places = range(len(question) + 1, len(question) + TOKENS_PER_IMAGE + 1)
    ids = torch.tensor([start_id(tokenizer), *asked, *[IMAGE_ID] * TOKENS_PER_IMAGE, *answer])
    places = torch.tensor([-1, *asked_places, *image_places, *answer_places])
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


def _words(tokenizer: Any, text: str, *, after: int) -> tuple[list[int], list[int]]:
    """Tokens of a text and the place where each ends; -1 for a token that covers no character."""
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return read["input_ids"], [after + end if end > begin else -1 for begin, end in read["offset_mapping"]]


def _prefers(module: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """By how much the model prefers the first of two words to the second after each picture, summed."""
    scores = module(dict(inputs))
    preferred: Tensor = (scores[:, 0] - scores[:, 1]).sum()
    return preferred
