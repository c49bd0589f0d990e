"""Who takes part in which round, and with which seed: decided by the run's seed alone, whatever runs where."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

__all__ = ["client_seed", "participants"]


def participants(client_ids: Sequence[str], *, fraction: float, seed: int, round: int) -> tuple[str, ...]:
    """Draw a round's clients, without replacement.

    Args:
        client_ids: all of the run.
        fraction: how many of them take part, above 0 to 1; at least one does.
        seed: of the run.
        round: from 0.

    Returns:
        Ids in the order of ``client_ids``.

    Example:
        >>> participants(["a", "b", "c"], fraction=1.0, seed=0, round=0)
        ('a', 'b', 'c')
        >>> len(participants(["a", "b", "c"], fraction=0.5, seed=0, round=0))
        2
    """
    count = max(1, int(len(client_ids) * fraction + 0.5))
    if count >= len(client_ids):
        return tuple(client_ids)
    generator = torch.Generator().manual_seed(_number(f"round {round} of {seed}"))
    drawn = torch.randperm(len(client_ids), generator=generator)[:count].tolist()
    return tuple(client_ids[index] for index in sorted(drawn))


def client_seed(seed: int, client_id: str) -> int:
    """A client's own seed.

    Example:
        >>> client_seed(0, "a") == client_seed(0, "a"), client_seed(0, "a") == client_seed(0, "b")
        (True, False)
    """
    return _number(f"client {client_id} of {seed}")


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
