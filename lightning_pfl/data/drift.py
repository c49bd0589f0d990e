"""A covariate that drifts inside a task: the question stays, what pictures look like changes from round to round."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

__all__ = ["drifting_order"]


def drifting_order(
    covariates: Sequence[Hashable],
    *,
    order: Sequence[Hashable] | None = None,
    width: float = 1.0,
    seed: int = 0,
) -> Tensor:
    r"""Order rows so that values of a covariate (an artist, a camera, a hospital) come one after another.

    A row whose value is the k-th of K gets the time :math:`(k + 1/2 + w u) / K` with u uniform in [-1/2, 1/2]; rows
    come by time. For `DynamicStream(orders=...)`.

    Args:
        covariates: one value per row.
        order: the values in the order of time. None: as they first appear.
        width: w >= 0. 1 gives phases that touch, 2 lets each reach half into its neighbours, many times K no drift
            at all. Below 1 nothing changes but that there is time between phases.
        seed: of u.

    Returns:
        A permutation of the rows, int64.

    Raises:
        ValueError: a value that ``order`` lacks or names twice, or a negative width.

    Example:
        >>> drifting_order(["red", "blue", "red", "blue"], order=["blue", "red"], seed=0).sort().values
        tensor([0, 1, 2, 3])
        >>> [["red", "blue", "red", "blue"][row] for row in drifting_order(["red", "blue", "red", "blue"])]
        ['red', 'red', 'blue', 'blue']
    """
    values = list(dict.fromkeys(covariates)) if order is None else list(order)
    if len(set(values)) != len(values):
        raise ValueError(f"`order` must name every value once, but is {values}.")
    if missing := sorted({str(value) for value in covariates if value not in values}):
        raise ValueError(f"`order` must name every value of the covariate, but lacks {missing}.")
    if width < 0:
        raise ValueError(f"`width` must not be negative, but is {width}.")
    places = torch.tensor([values.index(value) for value in covariates], dtype=torch.float64)
    noise = torch.rand(len(places), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return (places + width * noise).argsort(stable=True)
