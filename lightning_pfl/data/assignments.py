"""Which model belongs to which client: one for all, in turn, in given numbers, or so that relatives differ."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch

__all__ = ["assign_across", "assign_in_turn", "assign_shares"]

Model = TypeVar("Model")


def assign_in_turn(client_ids: Sequence[str], models: Sequence[Model]) -> dict[str, Model]:
    """Deal models out in turn; one model for all clients is the homogeneous case.

    Raises:
        ValueError: no model, or a client twice.

    Example:
        >>> assign_in_turn(["a", "b", "c"], ["1B", "3B"])
        {'a': '1B', 'b': '3B', 'c': '1B'}
    """
    _check(client_ids, models)
    return {client: models[index % len(models)] for index, client in enumerate(client_ids)}


def assign_shares(client_ids: Sequence[str], counts: Mapping[Model, int], *, seed: int = 0) -> dict[str, Model]:
    """Give each model to a given number of clients, drawn at random.

    Args:
        client_ids: who there is.
        counts: clients per model; together all of them.
        seed: of the draw.

    Raises:
        ValueError: counts that do not add up to the clients, or one that is negative.

    Example:
        >>> sorted(assign_shares(["a", "b", "c"], {"1B": 2, "3B": 1}, seed=0).values())
        ['1B', '1B', '3B']
    """
    _check(client_ids, list(counts))
    if min(counts.values()) < 0 or sum(counts.values()) != len(client_ids):
        raise ValueError(
            f"`counts` must add up to the {len(client_ids)} clients, but is {dict(counts)}, which is "
            f"{sum(counts.values())}."
        )
    dealt = [model for model, count in counts.items() for _ in range(count)]
    order = torch.randperm(len(dealt), generator=torch.Generator().manual_seed(seed)).tolist()
    return {client: dealt[index] for client, index in zip(client_ids, order, strict=True)}


def assign_across(groups: Mapping[str, Hashable], models: Sequence[Model]) -> dict[str, Model]:
    """Deal models out in turn within each group of related clients, so that relatives are on different models.

    Groups begin with different models in turn, so that no model gets the first client of every group.

    Args:
        groups: by client id the family of its task.
        models: at least one.

    Raises:
        ValueError: no model.

    Example:
        >>> assign_across({"cats": "animals", "flags": "signs", "dogs": "animals", "roads": "signs"}, ["1B", "3B"])
        {'cats': '1B', 'flags': '3B', 'dogs': '3B', 'roads': '1B'}
    """
    _check(list(groups), models)
    offsets = {group: index for index, group in enumerate(dict.fromkeys(groups.values()))}
    taken: dict[Hashable, int] = {}
    assigned = {}
    for client, group in groups.items():
        turn = taken.get(group, 0)
        taken[group] = turn + 1
        assigned[client] = models[(offsets[group] + turn) % len(models)]
    return assigned


def _check(client_ids: Sequence[str], models: Sequence[object]) -> None:
    if not models:
        raise ValueError("There must be at least one model to assign, but there is none.")
    if len(set(client_ids)) != len(client_ids):
        twice = sorted({client for client in client_ids if list(client_ids).count(client) > 1})
        raise ValueError(f"Every client must be named once, but {twice} are named more often.")
