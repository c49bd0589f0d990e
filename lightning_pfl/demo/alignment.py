"""Aligning the demo's models on public captions: every model names the same pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pfl.adapters import CoLoraConfig, inject
from lightning_pfl.adapters.alignment import Alignment, align
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
        anchor: key of the model whose bases stay.
        config: of the adapters, the same for all.

    Returns:
        The alignment, by base identity.
    """
    for module in modules.values():
        inject(module, config)
    records = caption_readings(tokenizers, store, captions)
    return align(modules, records, anchor=anchor, loss=_caption_loss)


def caption_readings(
    tokenizers: Mapping[str, Any], store: FeatureStore, captions: Sequence[Caption]
) -> list[dict[str, Reading]]:
    """Captions as each model reads them; a visual token's place is its cell, a word's place where it ends.

    Args:
        tokenizers: by key of a model.
        store: gives the pictures' features.
        captions: pictures with names.

    Returns:
        Records of `_BATCH` captions, the last one shorter, as `align` takes them.
    """
    return [
        {key: _reading(tokenizer, store, captions[start : start + _BATCH]) for key, tokenizer in tokenizers.items()}
        for start in range(0, len(captions), _BATCH)
    ]


def _reading(tokenizer: Any, store: FeatureStore, captions: Sequence[Caption]) -> Reading:
    start = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    image = list(range(1, TOKENS_PER_IMAGE + 1))
    rows = []
    for caption in captions:
        words = tokenizer(f"{PROMPT} {caption.name}", add_special_tokens=False, return_offsets_mapping=True)
        ids = [*start, *[IMAGE_ID] * TOKENS_PER_IMAGE, *words["input_ids"]]
        ends = [TOKENS_PER_IMAGE + end if end > begin else -1 for begin, end in words["offset_mapping"]]
        prompt = sum(1 for begin, _ in words["offset_mapping"] if begin < len(PROMPT))
        rows.append((ids, [*[-1] * len(start), *image, *ends], len(start) + TOKENS_PER_IMAGE + prompt))
    longest = max(len(ids) for ids, _, _ in rows)
    input_ids, mask, labels, places = (
        torch.full((len(rows), longest), fill, dtype=torch.long) for fill in (0, 0, -100, -1)
    )
    for row, (ids, ends, first) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
        labels[row, first : len(ids)] = torch.tensor(ids[first:])
        places[row, : len(ids)] = torch.tensor(ends)
    features = store.tokens([caption.view for caption in captions])
    return Reading({"features": features, "input_ids": input_ids, "attention_mask": mask, "labels": labels}, places)


def _caption_loss(module: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Summed cross entropy of the captions' words, over the whole vocabulary at those few positions."""
    assert isinstance(module, VisionLanguageModule)
    hidden = module.hidden_states(dict(inputs))
    labels = inputs["labels"][:, 1:]
    said = labels != -100
    head = module.language_model.get_output_embeddings()  # type: ignore[operator]  # a method of transformers models
    return nn.functional.cross_entropy(head(hidden[:, :-1][said]).float(), labels[said], reduction="sum")
