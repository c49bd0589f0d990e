"""The few tokens of a vocabulary that a benchmark's answers begin with.

A model that goes on from states needs its head for the offered answers only. Up to 262,144 rows that are never read
would otherwise be written, summed and mapped in every turn of every client.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from lightning_pfl.benchmark._compat import keep_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["KeptTokens"]


@final
@dataclass(frozen=True, eq=False)
class KeptTokens:
    """Tokens that stay, and what they are called afterwards: their place among them.

    Attributes:
        ids: increasing, int64.

    Example:
        >>> kept = KeptTokens.of([[7, 3], [7]])
        >>> kept.ids.tolist(), kept.places([7, 3])
        ([3, 7], [1, 0])
    """

    ids: Tensor

    @staticmethod
    def of(rows: Iterable[Sequence[int]]) -> KeptTokens:
        """All that occur."""
        return KeptTokens(torch.tensor(sorted({token for row in rows for token in row}), dtype=torch.long))

    def places(self, tokens: Sequence[int]) -> list[int]:
        """The new names of tokens.

        Raises:
            ValueError: one that was not kept.
        """
        wanted = torch.as_tensor(tokens, dtype=torch.long)
        found = torch.searchsorted(self.ids, wanted).clamp(max=len(self.ids) - 1)
        if bool((self.ids[found] != wanted).any()):
            raise ValueError(f"Only {len(self.ids)} tokens were kept, but {list(tokens)} are not all among them.")
        return found.tolist()

    def shrink(self, language_model: PreTrainedModel) -> None:
        """Leave a model these rows of its embedding and head only, in place."""
        keep_rows(language_model, self.ids)
