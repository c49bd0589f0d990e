r"""Statistics that few bad values cannot move: of vectors, of norms, of counts.

Start at `coordinate_median`, `trimmed_mean` and `krum_selection`, which turn the vectors of n clients into one of which
up to f attackers decide nothing, and at `upper_fence`, which says how large an honest number may be. All of them are
functions of the set of clients: ties are broken by position, and nothing is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median, median_low

import torch
from torch import Tensor

__all__ = ["clip_rows", "coordinate_median", "krum_selection", "trimmed_mean", "upper_fence"]

_TO_DEVIATION = 1.4826  # of a normal distribution: standard deviation over median absolute deviation


def coordinate_median(values: Tensor) -> Tensor:
    """The median of every coordinate on its own; of an even number, the mean of the middle two.

    Args:
        values: float32, shape ``[n, d]``, one row per client.

    Returns:
        Shape ``[d]``. While fewer than n / 2 rows are bad, every coordinate lies between those of two good rows.

    Raises:
        ValueError: no rows.

    Source:
        Yin et al., ICML 2018, arXiv:1803.01498, Option I.

    Example:
        >>> coordinate_median(torch.tensor([[1.0, 5.0], [2.0, 6.0], [1e9, -1e9]]))
        tensor([2., 5.])
    """
    return trimmed_mean(values, (_rows(values) - 1) // 2)


def trimmed_mean(values: Tensor, trim: int) -> Tensor:
    """The mean of every coordinate without its largest and smallest values.

    Args:
        values: float32, shape ``[n, d]``, one row per client.
        trim: how many to leave out at each end; ``2 * trim < n``.

    Returns:
        Shape ``[d]``.

    Raises:
        ValueError: no rows, or none is left.

    Source:
        Yin et al., ICML 2018, arXiv:1803.01498, Option II.

    Example:
        >>> trimmed_mean(torch.tensor([[1.0], [2.0], [4.0], [1e9]]), trim=1)
        tensor([3.])
    """
    count = _rows(values)
    if not 0 <= 2 * trim < count:
        raise ValueError(
            f"Of {count} clients at most {(count - 1) // 2} can be left out at each end, but `trim` is {trim}."
        )
    return values.sort(dim=0).values[trim : count - trim].mean(dim=0)


def krum_selection(values: Tensor, num_attackers: int, *, keep: int) -> Tensor:
    r"""The clients whose vectors lie closest to their nearest neighbours.

    A client's score is the sum of squared distances to its :math:`n - f - 2` nearest others (at least one).

    Args:
        values: float32, shape ``[n, d]``, one row per client.
        num_attackers: f, how many of them may be bad. The paper's guarantee needs :math:`n \ge 2 f + 3`.
        keep: how many clients to select; 1 is Krum, more is Multi-Krum.

    Returns:
        int64, shape ``[keep]``: rows, best first; of equal ones the first comes first.

    Raises:
        ValueError: no rows, or ``keep`` out of range.

    Source:
        Blanchard et al., NeurIPS 2017, arXiv:1703.02757, section 4. Multi-Krum here keeps the m best.

    Example:
        >>> krum_selection(torch.tensor([[0.0], [1.0], [2.5], [4.5], [90.0]]), num_attackers=1, keep=1)
        tensor([1])
    """
    count = _rows(values)
    if not 1 <= keep <= count:
        raise ValueError(f"Krum selects 1 to {count} of {count} clients, but `keep` is {keep}.")
    exact = values.double()
    squares = (exact * exact).sum(dim=1)
    distances = (squares[:, None] + squares[None, :] - 2 * exact @ exact.T).clamp(min=0.0)
    distances.fill_diagonal_(torch.inf)
    neighbours = min(max(1, count - num_attackers - 2), max(1, count - 1))
    scores = distances.sort(dim=1).values[:, :neighbours].sum(dim=1)
    return scores.argsort(stable=True)[:keep]


def clip_rows(values: Tensor, limit: float) -> Tensor:
    """Shorten every row that is longer than a limit; its direction stays.

    Args:
        values: float32, shape ``[n, d]``.
        limit: the largest Euclidean norm, >= 0.

    Returns:
        Shape ``[n, d]``, fresh.

    Example:
        >>> clip_rows(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), limit=2.5)
        tensor([[1.5000, 2.0000],
                [0.0000, 1.0000]])
    """
    norms = torch.linalg.vector_norm(values.double(), dim=1, keepdim=True)
    scale = (limit / norms.where(norms > 0, 1.0)).clamp(max=1.0)
    clipped: Tensor = values.double() * scale
    return clipped.to(values.dtype)


def upper_fence(values: Sequence[float], *, factor: float, spreads: float, wary: bool = True) -> float | None:
    r"""How large an honest value may be, judged by values of which few are bad.

    The median times :math:`\exp(k \cdot 1.4826 \cdot \mathrm{MAD})` of the logarithms, and at least ``factor`` times
    the median: sizes differ by factors, so both the middle and the spread are taken of logarithms.

    Args:
        values: >= 0; zeros and values that are not finite say nothing and are left out.
        factor: how many times the median is fine in any case, >= 1.
        spreads: k, how many (robust) standard deviations above the median are fine.
        wary: of two middle values the lower counts, so that one bad value of two does not pull the fence up. False:
            what is between them counts, so that one tiny value of two does not pull it down.

    Returns:
        The fence; None when no value says anything.

    Source:
        The rule "median + k MAD" (Leys et al., 2013, doi:10.1016/j.jesp.2013.03.013), here of logarithms.

    Example:
        >>> round(upper_fence([90.0, 100.0, 100.0, 1e9], factor=10.0, spreads=6.0), 6)
        1000.0
    """
    logs = [math.log(value) for value in values if 0 < value < math.inf]
    if not logs:
        return None
    middle_of = median_low if wary else median
    middle = middle_of(logs)
    spread = middle_of([abs(log - middle) for log in logs]) * _TO_DEVIATION
    height = middle + max(spread * spreads, math.log(factor))
    return math.exp(height) if height < 709.0 else math.inf  # what a float can hold


def _rows(values: Tensor) -> int:
    if values.ndim != 2 or not values.shape[0]:
        raise ValueError(f"Clients' vectors must form a matrix [clients, d], but have shape {tuple(values.shape)}.")
    return values.shape[0]
