"""Who takes part in which round, and with which seed: decided by the run's seed alone, whatever runs where."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from math import ceil

import torch

__all__ = ["client_seed", "participants", "wanted"]


def participants(
    client_ids: Sequence[str],
    *,
    fraction: float,
    seed: int,
    round: int,
    over_select: float = 0.0,
    busy: Collection[str] = (),
) -> tuple[str, ...]:
    """Draw a round's clients, without replacement.

    Args:
        client_ids: all of the run.
        fraction: how many of them take part, above 0 to 1; at least one does.
        seed: of the run.
        round: from 0.
        over_select: which share to draw beyond that.
        busy: clients that are at work already; they are not drawn, and so many fewer are.

    Returns:
        Ids in the order of ``client_ids``.

    Example:
        >>> participants(["a", "b", "c"], fraction=1.0, seed=0, round=0)
        ('a', 'b', 'c')
        >>> len(participants(["a", "b", "c"], fraction=0.5, seed=0, round=0))
        2
    """
    free = [client_id for client_id in client_ids if client_id not in busy]
    at_work = min(len(client_ids), ceil(wanted(len(client_ids), fraction) * (1 + over_select) - 1e-9))
    count = max(0, at_work - (len(client_ids) - len(free)))
    if count == len(free):
        return tuple(free)
    generator = torch.Generator().manual_seed(_number(f"round {round} of {seed}"))
    drawn = torch.randperm(len(free), generator=generator)[:count].tolist()
    return tuple(free[index] for index in sorted(drawn))


def wanted(num_clients: int, fraction: float) -> int:
    """How many clients a fraction of them is; at least one.

    Example:
        >>> wanted(10, 0.25), wanted(10, 0.01)
        (3, 1)
    """
    return max(1, int(num_clients * fraction + 0.5))


def client_seed(seed: int, client_id: str) -> int:
    """A client's own seed.

    Example:
        >>> client_seed(0, "a") == client_seed(0, "a"), client_seed(0, "a") == client_seed(0, "b")
        (True, False)
    """
    return _number(f"client {client_id} of {seed}")


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
