"""Means over seeds and paired differences between methods, with Student's intervals.

Start at `paired`. Runs of two methods with one seed have the same clients, tasks, questions and batches, so their
difference says more than the difference of two means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

__all__ = ["Summary", "paired", "pearson", "spearman", "summary"]


@dataclass(frozen=True)
class Summary:
    """Some numbers in short.

    Attributes:
        count: how many.
        mean: of them; NaN of none.
        sd: standard deviation, with count - 1; NaN of fewer than two.
        low: where the true mean lies with 95 %, at least.
        high: at most.
    """

    count: int
    mean: float
    sd: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the interval's length."""
        return (self.high - self.low) / 2

    @property
    def is_decided(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def summary(values: Sequence[float]) -> Summary:
    r"""Mean, standard deviation and :math:`\bar x \pm t_{0.975, n-1}\, s / \sqrt n`.

    Args:
        values: one per seed; NaN is left out.

    Example:
        >>> found = summary([1.0, 2.0, 3.0])  # t of two degrees of freedom is 4.303; 4.303 * 1 / sqrt(3) = 2.484
        >>> found.mean, found.sd, round(found.low, 3), round(found.high, 3)
        (2.0, 1.0, -0.484, 4.484)
    """
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Summary(0, math.nan, math.nan, math.nan, math.nan)
    mean = fmean(known)
    if len(known) == 1:
        return Summary(1, mean, math.nan, math.nan, math.nan)
    from scipy.stats import t  # type: ignore[import-untyped, unused-ignore]  # an extra, and slow to import

    sd = stdev(known)
    half = float(t.ppf(0.975, len(known) - 1)) * sd / math.sqrt(len(known))
    return Summary(len(known), mean, sd, mean - half, mean + half)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Summary:
    """By how much one method is better than another, over the seeds that both have.

    Args:
        values: by seed.
        reference: by seed.

    Example:
        >>> found = paired({0: 5.0, 1: 7.0, 2: 9.0}, {0: 4.0, 1: 5.0, 3: 0.0})  # 1 and 2; t is 12.706
        >>> found.count, found.mean, round(found.half, 3)
        (2, 1.5, 6.353)
    """
    return summary([values[seed] - reference[seed] for seed in values if seed in reference])


def pearson(one: Sequence[float], other: Sequence[float]) -> float:
    """Correlation of two rows of numbers; NaN where one of them does not vary.

    Example:
        >>> round(pearson([1, 2, 3], [1, 3, 2]), 6)
        0.5
    """
    a, b = fmean(one), fmean(other)
    top = sum((x - a) * (y - b) for x, y in zip(one, other, strict=True))
    bottom = math.sqrt(sum((x - a) ** 2 for x in one) * sum((y - b) ** 2 for y in other))
    return top / bottom if bottom > 0 else math.nan


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Correlation of ranks; equal numbers share theirs.

    Example:
        >>> round(spearman([1, 10, 100], [1, 2, 3]), 6)
        1.0
    """
    return pearson(_ranks(one), _ranks(other))


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(x < value for x in values) + (sum(x == value for x in values) - 1) / 2 for value in values]
