r"""What a sequence of noisy releases costs: a running account, and epsilon at a delta.

Start at `Account`. Releases here are Gaussian mechanisms without sampling, so they add up exactly: releases whose noise
is :math:`z_1, z_2, \dots` times their sensitivity cost together what one with :math:`1/z^2 = \sum_i 1/z_i^2` costs,
however later ones depended on earlier ones. The one number is turned into epsilon by the ``dp-accounting`` package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Account", "noise_multiplier"]


@dataclass(frozen=True)
class Account:
    """What has been released so far.

    Attributes:
        releases: pairs of a noise multiplier (standard deviation over sensitivity) and how many releases had it.

    Source:
        Dong, Roth and Su, "Gaussian differential privacy", arXiv:1905.02383, corollary 3.3 (composition), and Balle
        and Wang, ICML 2018, arXiv:1805.06530, theorem 8 (epsilon, exact).

    Example:
        >>> account = Account().add(4.0).add(4.0).add(2.0)
        >>> account.releases
        ((2.0, 1), (4.0, 2))
        >>> round(account.epsilon(1e-5), 2)
        2.5
    """

    releases: tuple[tuple[float, int], ...] = ()

    def add(self, multiplier: float) -> Account:
        """The account after one more release.

        Args:
            multiplier: standard deviation of the noise over the sensitivity of what it hides, > 0.
        """
        counts = dict(self.releases)
        counts[multiplier] = counts.get(multiplier, 0) + 1
        return Account(tuple(sorted(counts.items())))

    @property
    def multiplier(self) -> float:
        """Of the one release that costs as much as all; infinity when there was none."""
        total = math.fsum(count / multiplier**2 for multiplier, count in self.releases)
        return 1 / math.sqrt(total) if total else math.inf

    def epsilon(self, delta: float) -> float:
        """The smallest epsilon for which all releases together are (epsilon, delta)-differentially private.

        Args:
            delta: above 0, below 1.

        Raises:
            ImportError: ``dp-accounting`` is not installed.
        """
        return float(_gaussian().get_epsilon_gaussian(self.multiplier, delta)) if self.releases else 0.0

    def dump(self) -> list[list[float]]:
        """Plain containers, for a checkpoint."""
        return [[multiplier, count] for multiplier, count in self.releases]

    @staticmethod
    def load(entry: Sequence[Sequence[float]]) -> Account:
        """Undo `dump`."""
        return Account(tuple((float(multiplier), int(count)) for multiplier, count in entry))


def noise_multiplier(epsilon: float, delta: float, *, releases: int = 1) -> float:
    """How much noise, over sensitivity, each of some releases needs, for all of them to stay within a budget.

    Args:
        epsilon: of all releases together, > 0.
        delta: above 0, below 1; well below one over the number of units (examples or clients).
        releases: how many there will be; usually one per round for a sketch.

    Raises:
        ValueError: a number out of range.
        ImportError: ``dp-accounting`` is not installed.

    Example:
        >>> multiplier = noise_multiplier(8.0, 1e-5, releases=20)
        >>> round(multiplier, 2)
2.71X    """
    if not epsilon > 0 or not 0 < delta < 1 or releases < 1:
        raise ValueError(
            f"A budget needs epsilon > 0, delta between 0 and 1 and at least one release, but has {epsilon}, {delta} "
            f"and {releases}."
        )
    one = float(_gaussian().get_sigma_gaussian(epsilon, delta))
    return _rounded_up(one * math.sqrt(releases), lambda z: _cost(z, releases, delta) <= epsilon)


def _cost(multiplier: float, releases: int, delta: float) -> float:
    return Account(((multiplier, releases),)).epsilon(delta)


def _rounded_up(value: float, is_enough: Callable[[float], bool]) -> float:
    """The solver stops within 1e-12, on either side; a budget must not be missed by that."""
    while not is_enough(value):
        value *= 1 + 1e-12
    return value


def _gaussian() -> Any:
    """The module of dp-accounting that is exact for Gaussian noise.

    Its accountants are not used: at replacement of one unit, `PLDAccountant` takes a multiplier to be relative to
    adding or removing one and doubles it, and `RdpAccountant` does not, so that the same number means two things.
    """
    try:
        from dp_accounting import gaussian_mechanism
    except ImportError as error:
        raise ImportError(
            "Counting what noisy releases cost needs the package `dp-accounting`: pip install 'lightning-pfl[privacy]'."
        ) from error
    return gaussian_mechanism
