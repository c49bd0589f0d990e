"""A question that any two language models can be asked alike: after this text, how much rather this word than that?

Start at `contrast_loss`. Aligning B needs gradients of the same thing in both models. The loss of the text itself asks
for the tokens that occur in it, which are few (public captions use some hundreds, fewer than a model is wide) and cut
differently; a contrast of two words that are one token in every vocabulary asks for thousands, and for the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["contrast_loss", "draw_contrast", "shared_words"]

_STARTS = ("\u2581", "\u0120")  # how SentencePiece and byte-level BPE mark a token that begins a word


def shared_words(tokenizers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Words of at least three lower-case letters that are one token, with a space before it, in every vocabulary.

    Args:
        tokenizers: per model, anything with ``get_vocab()``.

    Returns:
        Per model, int64 of shape ``[words]``: the token of each word, in one order for all models.

    Raises:
        ValueError: fewer than two such words.

    Example:
        >>> class Bpe:
        ...     def get_vocab(self): return {"\u0120cat": 4, "\u0120dog": 7, "s": 1}
        >>> class Piece:
        ...     def get_vocab(self): return {"\u2581dog": 0, "\u2581cat": 2, "\u2581Cat": 3}
        >>> {name: ids.tolist() for name, ids in shared_words({"a": Bpe(), "b": Piece()}).items()}
        {'a': [4, 7], 'b': [2, 0]}
    """
    known = {name: _words(tokenizer.get_vocab()) for name, tokenizer in tokenizers.items()}
    common = sorted(set.intersection(*(set(words) for words in known.values())))
    if len(common) < 2:
        counts = {name: len(words) for name, words in known.items()}
        raise ValueError(
            f"Asking all models for the same words needs two that are one token in each vocabulary, but there are "
            f"{len(common)} (words per vocabulary: {counts}). Pass loss=causal_lm_loss, or a loss of your own."
        )
    return {name: torch.tensor([words[word] for word in common]) for name, words in known.items()}


def draw_contrast(words: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """Two different words for one text, the same for all models and in every pass.

    Args:
        words: from `shared_words`.
        index: of the text.

    Returns:
        Per model, the tokens of the two words, int64 of shape ``[1, 2]``.
    """
    count = len(next(iter(words.values())))
    pair = torch.randperm(count, generator=torch.Generator().manual_seed(index))[:2]
    return {name: tokens[pair][None] for name, tokens in words.items()}


def contrast_loss(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """By how much a model prefers one word to another after each text, summed over texts.

    Args:
        model: called with ``input_ids`` and ``attention_mask``; its answer has ``.logits`` ``[batch, tokens, words]``.
        inputs: those two, padded on the right, and ``contrast`` ``[batch, 2]``.
    """
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    last = inputs["attention_mask"].sum(1) - 1
    scores = logits[torch.arange(len(last), device=last.device), last].float()
    chosen = scores.gather(1, inputs["contrast"])
    preferred: Tensor = (chosen[:, 0] - chosen[:, 1]).sum()
    return preferred


def _words(vocabulary: Mapping[str, int]) -> dict[str, int]:
    return {
        token[1:]: index
        for token, index in vocabulary.items()
        if token.startswith(_STARTS) and len(token) > 3 and token.isprintable() and _is_plain(token[1:])
    }


def _is_plain(word: str) -> bool:
    return word.isascii() and word.isalpha() and word.islower()
