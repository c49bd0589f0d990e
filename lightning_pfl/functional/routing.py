r"""Whose questions does this one look like? Keys say what an owner has trained on; a question goes to the nearest one.

Start at `Keys`, what one owner tells of its questions: a few centres in the space of a frozen reader, none of them with
a label. `distances` says how far questions are from every owner's, `nearest` who is to answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["Keys", "distances", "nearest"]

_RIDGE = 0.05  # of the mean spread: what a coordinate that hardly varies counts as


@final
@dataclass(frozen=True, eq=False)
class Keys:
    """Groups of questions that look alike, each by how many, where and how wide: sums that can be added up exactly.

    Attributes:
        rows: float32, shape ``[m, 1 + 2 k]``. Per group the number of questions, their mean in k coordinates, and the
            sum of their squared deviations from it in each. It is also the form in which keys travel.

    Raises:
        ValueError: no such rows, numbers that are not finite, a group of nothing, or negative squares.

    Example:
        >>> keys = Keys.of(torch.tensor([[0.0, 1.0], [0.0, 3.0], [9.0, 9.0]]), limit=2)
        >>> keys.counts, keys.means
        (tensor([2., 1.]), tensor([[0., 2.],
                [9., 9.]]))
        >>> keys.scatters
        tensor([[0., 2.],
                [0., 0.]])
    """

    rows: Tensor

    def __post_init__(self) -> None:
        if (fault := Keys.fault_in(self.rows)) is not None:
            raise ValueError(f"Keys {fault}.")

    @staticmethod
    def fault_in(rows: Tensor) -> str | None:
        """Why rows are no keys; None when they are."""
        if rows.ndim != 2 or rows.dtype != torch.float32 or rows.shape[1] < 3 or not rows.shape[1] % 2 or not len(rows):
            return (
                "must be float32 of shape [m, 1 + 2 k], at least one group of at least one coordinate, but are "
                f"{rows.dtype} of shape {tuple(rows.shape)}"
            )
        if not bool(torch.isfinite(rows).all()):
            return "must be finite, but hold NaN or infinity"
        width = rows.shape[1] // 2
        if bool((rows[:, 0] < 1).any()) or bool((rows[:, 1 + width :] < 0).any()):
            return "must count at least one question per group and sums of squares that are not negative"
        return None

    @staticmethod
    def of(questions: Tensor, *, limit: int) -> Keys:
        """Keys of questions ``[n, k]``, n > 0, in at most so many groups; their order does not matter.

        Raises:
            ValueError: as `merged`, or no questions.
        """
        one = torch.ones(len(questions), 1)
        return Keys(torch.cat([one, questions.float(), torch.zeros_like(questions.float())], dim=1)).merged(limit)

    @property
    def counts(self) -> Tensor:
        """Questions per group, ``[m]``."""
        return self.rows[:, 0]

    @property
    def means(self) -> Tensor:
        """``[m, k]``."""
        return self.rows[:, 1 : 1 + self.size]

    @property
    def scatters(self) -> Tensor:
        """Sums of squared deviations, ``[m, k]``."""
        return self.rows[:, 1 + self.size :]

    @property
    def size(self) -> int:
        """k."""
        return int(self.rows.shape[1] // 2)

    @property
    def nbytes(self) -> int:
        """What sending them costs."""
        return self.rows.numel() * self.rows.element_size()

    def __add__(self, other: Keys) -> Keys:
        """All groups of both."""
        return Keys(torch.cat([self.rows, other.rows]))

    def merged(self, limit: int) -> Keys:
        r"""At most so many groups, the ones put together whose union costs the least.

        Putting groups a and b together adds :math:`\frac{n_a n_b}{n_a + n_b} \lVert m_a - m_b \rVert^2` to the squared
        deviations (Ward's criterion). Counts, means and squared deviations of the union are exact. Groups are first
        put into one order, so that the same ones give the same bits however they came.

        Args:
            limit: >= 1.

        Raises:
            ValueError: a limit below 1.

        Source:
            Ward, JASA 1963; sums that can be added up: the clustering features of BIRCH, Zhang et al., SIGMOD 1996.
        """
        if limit < 1:
            raise ValueError(f"`limit` must be at least 1 group, but is {limit}.")
        order = sorted(range(len(self.rows)), key=self.rows.tolist().__getitem__)
        rows = self.rows[order].double()
        if len(rows) <= limit:
            return Keys(rows.float())
        width, left = self.size, len(rows)
        counts, means = rows[:, 0], rows[:, 1 : 1 + width]  # views: they follow the rows
        costs = counts[:, None] * counts / (counts[:, None] + counts) * torch.cdist(means, means).square()
        costs.fill_diagonal_(torch.inf)
        there = torch.ones(len(rows), dtype=torch.bool)
        while left > limit:
            one, two = divmod(int(costs.argmin()), len(rows))
            rows[one] = _union(rows[one], rows[two])
            there[two], left = False, left - 1
            anew = counts * counts[one] / (counts + counts[one]) * (means - means[one]).square().sum(dim=1)
            anew[~there] = torch.inf
            anew[one] = torch.inf
            costs[one], costs[:, one] = anew, anew
            costs[two], costs[:, two] = torch.inf, torch.inf
        return Keys(rows[there].float())


def distances(questions: Tensor, owners: Sequence[Keys]) -> Tensor:
    r"""How far questions are from each owner's nearest group, :math:`\min_g \sum_c (x_c - m_{gc})^2 / s_c`.

    :math:`s_c` is the variance within groups of coordinate c, pooled over all groups of all owners: what varies among
    questions of one kind says little of their kind.

    Args:
        questions: ``[n, k]``.
        owners: N keys, of the same k.

    Returns:
        Shape ``[n, N]``, without a unit: k is what a question of a known kind has on average.

    Raises:
        ValueError: no owner, or coordinates that differ in number.

    Example:
        >>> here = Keys.of(torch.tensor([[0.0], [2.0]]), limit=1)
        >>> there = Keys.of(torch.tensor([[9.0], [11.0]]), limit=1)
        >>> distances(torch.tensor([[1.0], [4.0]]), [here, there]).round()  # the variance within groups is 1
        tensor([[ 0., 77.],
                [ 9., 34.]])
    """
    sizes = {keys.size for keys in owners} | {questions.shape[-1]}
    if not owners or len(sizes) > 1:
        raise ValueError(
            "Questions and keys must have one number of coordinates, and there must be an owner, but there are "
            f"{len(owners)} owners and {sorted(sizes)} coordinates. Give all clients one reader."
        )
    together = torch.cat([keys.rows for keys in owners]).double()
    width = questions.shape[1]
    spread = together[:, 1 + width :].sum(dim=0) / together[:, 0].sum()
    level = spread.mean()
    spread = spread + (_RIDGE * level if level > 0 else 1.0)
    scale = spread.rsqrt()
    far = torch.cdist(questions.double() * scale, together[:, 1 : 1 + width] * scale).square()
    parts = far.split([len(keys.rows) for keys in owners], dim=1)
    return torch.stack([part.amin(dim=1) for part in parts], dim=1).float()


def nearest(distances: Tensor, *, own: int, margin: float = 1.5) -> Tensor:
    """Who answers each question: its own client if its keys are near enough, else the owner of the nearest ones.

    Related tasks look alike, and of two adapters that know a question the own one is the better: it was trained beside
    the client's own model. So the own one answers whatever is not much nearer to another.

    Args:
        distances: ``[n, N]``, from `distances`.
        own: place of the client that is asked.
        margin: how many times the smallest distance the own one may be, >= 1. 1: only if nobody is nearer.

    Returns:
        Places of owners, int64 ``[n]``; of equal ones the own, then the first.

    Raises:
        ValueError: a margin below 1.

    Example:
        >>> nearest(torch.tensor([[3.0, 2.0], [5.0, 2.0]]), own=0)
        tensor([0, 1])
    """
    if not margin >= 1:
        raise ValueError(f"`margin` is a multiple of the smallest distance, at least 1, but is {margin}.")
    least, found = distances.min(dim=1)
    return torch.where(distances[:, own] <= margin * least, own, found)


def _union(one: Tensor, two: Tensor) -> Tensor:
    """One group of two, ``[1 + 2 k]``."""
    width = len(one) // 2
    count = one[0] + two[0]
    between = two[1 : 1 + width] - one[1 : 1 + width]
    mean = one[1 : 1 + width] + between * (two[0] / count)
    scatter = one[1 + width :] + two[1 + width :] + between.square() * (one[0] * two[0] / count)
    return torch.cat([count[None], mean, scatter])
