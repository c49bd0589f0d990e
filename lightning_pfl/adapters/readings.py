"""What each model sees of a piece of public data, and which positions of two models have read the same.

Start at `Reading`. Two models may cut one text into different tokens, so positions are named by how much of the text
they have read: a position of one model belongs to the position of the other that ends at the same character.
`TextReader` makes readings of texts from a tokenizer; for anything else (images, tables) write them yourself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Match", "Reading", "TextReader", "match"]


@dataclass(frozen=True, eq=False)
class Reading:
    """A batch of public data as one model takes it.

    Attributes:
        inputs: keyword arguments of the model's forward; for the default loss with ``labels``, -100 where none.
        places: int64, shape ``[batch, positions]``: how far each position has read, in units that all models share
            (characters of a text, cells of an image). It grows along a row. -1: a position that belongs to nothing,
            such as padding or a start token.
    """

    inputs: Mapping[str, Any]
    places: Tensor


@dataclass(frozen=True, eq=False)
class Match:
    """Positions of one model that correspond to positions of another, over a batch.

    Attributes:
        last: int64, shape ``[n]``: the flat index (row * positions + position) of the position that ends at each place
            that both models share.
        segment: int64, shape ``[batch * positions]``: which shared place each position leads up to; n where none.
    """

    last: Tensor
    segment: Tensor

    def states(self, values: Tensor) -> Tensor:
        """Pick the last position of each shared place: both models have read exactly the same there.

        Args:
            values: shape ``[batch, positions, d]``.

        Returns:
            Shape ``[n, d]``.
        """
        return values.flatten(0, 1)[self.last.to(values.device)]

    def effects(self, values: Tensor) -> Tensor:
        """Sum over the positions that lead up to each shared place: a step taken at every one of them adds up.

        Args:
            values: gradients, shape ``[batch, positions, d]``.

        Returns:
            Shape ``[n, d]``.
        """
        flat = values.flatten(0, 1)
        sums = flat.new_zeros(len(self.last) + 1, flat.shape[1])
        return sums.index_add_(0, self.segment.to(flat.device), flat)[:-1]


def match(first: Tensor, second: Tensor) -> tuple[Match, Match]:
    """Find the places that both models have read up to, row by row.

    Args:
        first: `Reading.places` of one model, ``[batch, positions of the first]``.
        second: of the other, ``[batch, positions of the second]``.

    Returns:
        A `Match` for each; their n and the order of their places are the same.

    Raises:
        ValueError: a different number of rows, or places that shrink along a row.

    Example:
        >>> import torch
        >>> one, other = match(torch.tensor([[-1, 3, 5, 9]]), torch.tensor([[3, 9, -1]]))
        >>> one.last.tolist(), other.last.tolist()
        ([1, 3], [0, 1])
        >>> one.effects(torch.tensor([[[7.0], [1.0], [2.0], [4.0]]])).tolist()
        [[1.0], [6.0]]
    """
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second):
        raise ValueError(
            "Places must be [batch, positions] with one row per text on both sides, but are "
            f"{list(first.shape)} and {list(second.shape)}."
        )
    rows = [_shared(a, b) for a, b in zip(first, second, strict=True)]
    return _gather(first, rows), _gather(second, rows)


def _shared(first: Tensor, second: Tensor) -> Tensor:
    """Sorted places that occur in both rows."""
    unique = first[first >= 0].unique()
    shared: Tensor = unique[torch.isin(unique, second)]
    return shared


def _gather(places: Tensor, shared: Sequence[Tensor]) -> Match:
    batch, positions = places.shape
    total = sum(len(row) for row in shared)
    last, segment = [], torch.full((batch, positions), total, dtype=torch.int64)
    start = 0
    for row, (here, wanted) in enumerate(zip(places, shared, strict=True)):
        read = here[here >= 0]
        if len(read) > 1 and not bool((read[1:] >= read[:-1]).all()):
            raise ValueError(f"Places must grow along a row, but row {row} is {here.tolist()}.")
        indices = torch.arange(positions)[here >= 0]
        last.append(row * positions + indices[torch.searchsorted(read, wanted, right=True) - 1])
        nearest = torch.searchsorted(wanted, read)
        segment[row, indices] = torch.where(nearest < len(wanted), nearest + start, total)
        start += len(wanted)
    return Match(last=torch.cat(last), segment=segment.flatten())


@dataclass(frozen=True)
class TextReader:
    """Reads texts for a causal language model with its own tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers, or anything called and answering like one
            (``return_offsets_mapping``).
        max_length: tokens per text; the rest is cut off.
    """

    tokenizer: Any
    max_length: int = 256

    def __call__(self, texts: Sequence[str]) -> Reading:
        """Tokenise and pad on the right.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels`` of shape ``[texts, tokens]``; a token's place is the
            character at which it ends.

        Raises:
            TypeError: a tokenizer without character offsets.
        """
        if not getattr(self.tokenizer, "is_fast", True):
            raise TypeError(
                f"Matching tokens of two models needs character offsets, which `{type(self.tokenizer).__name__}` does "
                "not give. Load its fast version (`AutoTokenizer.from_pretrained(..., use_fast=True)`)."
            )
        rows = [
            self.tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=self.max_length)
            for text in texts
        ]
        longest = max((len(row["input_ids"]) for row in rows), default=0)
        ids, mask, labels, places = (torch.full((len(rows), longest), fill) for fill in (0, 0, -100, -1))
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[index, :length] = torch.tensor(row["input_ids"], dtype=torch.int64)
            mask[index, :length] = 1
            labels[index, :length] = ids[index, :length]
            ends = [end if end > start else -1 for start, end in row["offset_mapping"]]
            places[index, :length] = torch.tensor(ends, dtype=torch.int64)
        return Reading(inputs={"input_ids": ids, "attention_mask": mask, "labels": labels}, places=places)
