"""A question that any two language models can be asked alike: after this text, how much rather this word than that?

Start at `contrast_loss`. Aligning B needs gradients of the same thing in both models. The loss of the text itself asks
for the tokens that occur in it, which are few (public captions use some hundreds, fewer than a model is wide) and cut
differently; a contrast of two words that are one token in every vocabulary asks for thousands, and for the same ones.
It is asked behind every word of a text, not only behind the last: in the last block of a model that is the only way in
which one text says more than one thing about o, gate, up and down (`benchmarks/alignment_transfer`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["contrast_loss", "draw_contrast", "places_to_ask", "shared_words"]

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


def draw_contrast(words: Mapping[str, Tensor], index: int, num_pairs: int = 1) -> dict[str, Tensor]:
    """Pairs of two different words for one text, the same for all models and in every pass.

    Args:
        words: from `shared_words`.
        index: of the text.
        num_pairs: how many pairs.

    Returns:
        Per model, the tokens of the words, int64 of shape ``[num_pairs, 2]``.
    """
    count, generator = len(next(iter(words.values()))), torch.Generator().manual_seed(index)
    pairs = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(num_pairs)])
    return {name: tokens[pairs] for name, tokens in words.items()}


def places_to_ask(text: str, places: Mapping[str, Tensor]) -> list[int]:
    """Where a word ends in the text as every model reads it; where none does, the last place that all have read up to.

    Args:
        text: that was read.
        places: per model, `Reading.places` of the text, ``[positions]``.

    Example:
        >>> places_to_ask("a cat sat", {"a": torch.tensor([-1, 1, 5, 9]), "b": torch.tensor([1, 4, 5, 7, 9])})
        [1, 5, 9]
        >>> places_to_ask("sat", {"a": torch.tensor([1, 2]), "b": torch.tensor([2])})  # cut off inside a word
        [2]
    """
    shared = sorted(set.intersection(*(set(read.tolist()) for read in places.values())) - {-1})
    ends = [place for place in shared if place == len(text) or text[place].isspace()]
    return ends or shared[-1:]


def contrast_loss(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """By how much a model prefers one word to another, summed over the positions that are asked about.

    Args:
        model: called with ``input_ids`` and ``attention_mask`` (and ``logits_to_keep`` if it takes that, as the causal
            models of transformers do, so that a vocabulary's scores are computed where they are asked for only); its
            answer has ``.logits`` ``[batch, tokens, words]``.
        inputs: those two, ``contrast`` ``[n, 2]``, pairs of tokens, and ``asked`` ``[n, 2]``: the row and the position
            behind which each pair is weighed.
    """
    rows, positions = inputs["asked"].unbind(1)
    kept, where = positions.unique(return_inverse=True)
    given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**given, logits_to_keep=kept).logits
    else:
        logits = model(**given).logits[:, kept]
    chosen = logits[rows, where].float().gather(1, inputs["contrast"])
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
