"""How one data set is divided among clients: evenly, with skewed labels, or by a key such as a task or a person.

Every function returns one tensor of row indices per client, together each row exactly once. `ClientDataModule` takes
them as they are.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["dirichlet_partition", "even_partition", "partition_by_key"]


def even_partition(num_rows: int, num_clients: int, *, seed: int = 0) -> list[Tensor]:
    """Deal shuffled rows out evenly.

    Args:
        num_rows: how many rows there are, at least ``num_clients``.
        num_clients: among how many to divide.
        seed: of the shuffle.

    Returns:
        Per client sorted indices, int64; sizes differ by one at most.

    Raises:
        ValueError: fewer rows than clients.

    Example:
        >>> [len(part) for part in even_partition(10, 3)]
        [4, 3, 3]
    """
    _check_sizes(num_rows, num_clients)
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    return [part.sort().values for part in order.tensor_split(num_clients)]


def dirichlet_partition(
    labels: Sequence[int] | Tensor, num_clients: int, *, concentration: float, min_rows: int = 1, seed: int = 0
) -> list[Tensor]:
    r"""Give each client its own mixture of classes, :math:`p_c \sim \mathrm{Dir}(\alpha 1_N)` per class c.

    Args:
        labels: one class per row.
        num_clients: N, among how many to divide.
        concentration: alpha > 0; 0.1 is strongly skewed, 100 nearly even.
        min_rows: every client gets at least so many rows; drawn anew (with the next seed of the stream) until it does.
        seed: of all draws.

    Returns:
        Per client sorted indices, int64.

    Raises:
        ValueError: too few rows for so many clients, or no draw in 1,000 gave every client ``min_rows``.

    Source:
        Hsu, Qi, Brown 2019, arXiv:1909.06335; drawn per class over clients as in Yurochkin et al. 2019,
        arXiv:1905.12022.

    Example:
        >>> parts = dirichlet_partition([0, 1] * 50, 4, concentration=0.5, seed=1)
        >>> sorted(torch.cat(parts).tolist()) == list(range(100))
        True
    """
    labels = torch.as_tensor(labels)
    _check_sizes(len(labels), num_clients * max(min_rows, 1))
    if concentration <= 0:
        raise ValueError(f"`concentration` must be positive, but is {concentration}.")
    generator = np.random.default_rng(seed)
    for _ in range(1000):
        parts: list[list[Tensor]] = [[] for _ in range(num_clients)]
        for label in labels.unique(sorted=True):
            rows = (labels == label).nonzero().flatten()
            rows = rows[torch.from_numpy(generator.permutation(len(rows)))]
            shares = generator.dirichlet([concentration] * num_clients)
            cuts = (shares.cumsum()[:-1] * len(rows)).round().astype(int).clip(max=len(rows))
            for part, piece in zip(parts, rows.tensor_split(cuts.tolist()), strict=True):
                part.append(piece)
        whole = [torch.cat(part).sort().values for part in parts]
        if min(map(len, whole)) >= min_rows:
            return whole
    raise ValueError(
        f"No draw in 1,000 gave each of {num_clients} clients `min_rows`={min_rows} of {len(labels)} rows at "
        f"`concentration`={concentration}. Raise the concentration, or ask for fewer clients or rows."
    )


def partition_by_key(keys: Sequence[Hashable], num_clients: int | None = None) -> list[Tensor]:
    """Keep rows with one key (a person, a ward, a task) together.

    Args:
        keys: one per row.
        num_clients: None gives every key a client of its own, in order of first appearance; otherwise keys are dealt
            out one after another, so that a client may hold several.

    Returns:
        Per client sorted indices, int64.

    Raises:
        ValueError: fewer keys than clients.

    Example:
        >>> [part.tolist() for part in partition_by_key(["a", "b", "a", "c"])]
        [[0, 2], [1], [3]]
    """
    rows: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    count = len(rows) if num_clients is None else num_clients
    _check_sizes(len(rows), count)
    parts: list[list[int]] = [[] for _ in range(count)]
    for index, members in enumerate(rows.values()):
        parts[index % count].extend(members)
    return [torch.tensor(sorted(part)) for part in parts]


def _check_sizes(available: int, wanted: int) -> None:
    if wanted < 1 or available < wanted:
        raise ValueError(f"Cannot divide {available} rows (or keys) so that {wanted} are needed at least.")
