r"""Whose questions does this one look like? Keys say what an owner has trained on, and who is near is asked.

Start at `Keys`, what one owner tells of its questions: a few centres in the space of a frozen reader, none of them with
a label. `distances` says how far questions are from every owner's, an `Answering` whose adapters answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from typing_extensions import override

__all__ = ["Answering", "Blend", "Keys", "Nearest", "distances"]

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


class Answering(ABC):
    """Whose adapters answer a question, told from how far it is from everybody's."""

    @abstractmethod
    def weights(self, distances: Tensor, *, own: int) -> Tensor:
        """How much each owner's adapter counts in the one that answers.

        Args:
            distances: ``[n, N]``, from `distances`.
            own: place of the client that is asked.

        Returns:
            float32 ``[n, N]``, 0 or more; rows sum to 1.
        """


@final
@dataclass(frozen=True)
class Blend(Answering):
    """The mean of the adapters of all who have trained on such questions, in which the own one counts somewhat more.

    Adapters that have learned one kind of question from different data err differently, so their mean knows more than
    any of them, the client's own included. A ``reach`` that is too long takes in clients with other kinds of questions.

    Args:
        reach: how many times the smallest distance an owner may be away, >= 1.
        own: what the client's own adapter counts where it is among them, beside its part of the mean, 0 to 1.

    Raises:
        ValueError: a number out of range.

    Source:
        Ours; weights of a mean per question, as the Co-LoRA paper has them per client (arXiv:2506.11024).

    Example:
        >>> Blend(reach=2, own=0.5).weights(torch.tensor([[3.0, 2.0, 9.0], [5.0, 2.0, 3.0]]), own=0)
        tensor([[0.7500, 0.2500, 0.0000],
                [0.0000, 0.5000, 0.5000]])
    """

    reach: float = 2.0
    own: float = 0.25

    def __post_init__(self) -> None:
        _require_multiple("reach", self.reach)
        if not 0 <= self.own <= 1:
            raise ValueError(f"`own` must be between 0 and 1, but is {self.own}.")

    @override
    def weights(self, distances: Tensor, *, own: int) -> Tensor:
        """Equal ones for those in reach, and what the own one has beside that."""
        near = _within(distances, self.reach).float()
        mean = near / near.sum(dim=1, keepdim=True)
        extra = self.own * near[:, own : own + 1]
        return (1 - extra) * mean + extra * _alone(torch.full((len(near),), own), near)


@final
@dataclass(frozen=True)
class Nearest(Answering):
    """One adapter: the client's own if its keys are near enough, else the nearest owner's.

    Related tasks look alike, and of two adapters that know a question the own one is the better: it was trained beside
    the client's own model. So the own one answers whatever is not much nearer to another.

    Args:
        margin: how many times the smallest distance the own one may be away, >= 1. 1: only if nobody is nearer.

    Raises:
        ValueError: a margin below 1.

    Example:
        >>> Nearest().weights(torch.tensor([[3.0, 2.0], [5.0, 2.0]]), own=0)
        tensor([[1., 0.],
                [0., 1.]])
    """

    margin: float = 1.5

    def __post_init__(self) -> None:
        _require_multiple("margin", self.margin)

    @override
    def weights(self, distances: Tensor, *, own: int) -> Tensor:
        """1 for who answers; of equally near ones the own, then the first."""
        is_own = _within(distances, self.margin)[:, own]
        return _alone(torch.where(is_own, own, distances.argmin(dim=1)), distances)


def _within(distances: Tensor, times: float) -> Tensor:
    return distances <= times * distances.amin(dim=1, keepdim=True)


def _alone(places: Tensor, like: Tensor) -> Tensor:
    return nn.functional.one_hot(places, like.shape[1]).float()


def _require_multiple(name: str, value: float) -> None:
    if not value >= 1:
        raise ValueError(f"`{name}` is a multiple of the smallest distance, at least 1, but is {value}.")


def _union(one: Tensor, two: Tensor) -> Tensor:
    """One group of two, ``[1 + 2 k]``."""
    width = len(one) // 2
    count = one[0] + two[0]
    between = two[1 : 1 + width] - one[1 : 1 + width]
    mean = one[1 : 1 + width] + between * (two[0] / count)
    scatter = one[1 + width :] + two[1 + width :] + between.square() * (one[0] * two[0] / count)
    return torch.cat([count[None], mean, scatter])
