r"""What a sequence of noisy releases costs: a running account, what it may cost, and what has been sent already.

Start at `Account`. Releases here are Gaussian mechanisms without sampling, so they add up exactly: releases whose noise
is :math:`z_1, z_2, \dots` times their sensitivity cost together what one with :math:`1/z^2 = \sum_i 1/z_i^2` costs,
however later ones depended on earlier ones. The one number is turned into epsilon by the ``dp-accounting`` package.
`Ledger` is a client's account, with what tells a release from the same bytes sent once more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Account", "Ledger", "PrivacyBudget"]


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

    def add(self, multiplier: float, *, times: int = 1) -> Account:
        """The account after more releases.

        Args:
            multiplier: standard deviation of the noise over the sensitivity of what it hides, > 0.
            times: how many.
        """
        counts = dict(self.releases)
        counts[multiplier] = counts.get(multiplier, 0) + times
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


@dataclass(frozen=True)
class PrivacyBudget:
    r"""How much all that one client ever sends may tell: (epsilon, delta)-differential privacy.

    For any two neighbouring data sets, whatever is sent is at most :math:`e^\epsilon` times as likely under one as
    under the other, but for events of probability `delta`.

    Args:
        epsilon: above 0. Infinity never stops anything, and the account is kept all the same.
        delta: above 0, below 1; well below one over the number of units (examples of a client, or clients).

    Raises:
        ValueError: a number out of range.
        ImportError: ``dp-accounting`` is not installed.

    Example:
        >>> PrivacyBudget(epsilon=8, delta=1e-5).allows(Account().add(4.0))
        True
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not self.epsilon > 0 or not 0 < self.delta < 1:
            raise ValueError(
                f"A budget needs epsilon > 0 and delta above 0 and below 1, but has epsilon={self.epsilon} and "
                f"delta={self.delta}. Usual are epsilon from 1 to 8, and delta below one over the number of units that "
                "are hidden."
            )
        _gaussian()

    def allows(self, account: Account) -> bool:
        """Whether all that is in an account stays within the budget."""
        return account.epsilon(self.delta) <= self.epsilon

    def noise_multiplier(self, *, releases: int) -> float:
        """The least noise, over sensitivity, with which each of some releases stays within the budget together.

        Args:
            releases: how many there will be: usually one per round for sketches, and one more for updates.

        Raises:
            ValueError: fewer than one release, or an infinite epsilon, for which none is too little.

        Example:
            >>> budget = PrivacyBudget(epsilon=8, delta=1e-5)
            >>> multiplier = budget.noise_multiplier(releases=20)
            >>> round(multiplier, 2), budget.allows(Account().add(multiplier, times=20))
            (2.68, True)
        """
        if releases < 1 or math.isinf(self.epsilon):
            raise ValueError(
                f"A noise multiplier follows from a finite epsilon and at least one release, but here are "
                f"epsilon={self.epsilon} and {releases} releases."
            )
        multiplier = float(_gaussian().get_sigma_gaussian(self.epsilon, self.delta)) * math.sqrt(releases)
        step = 1e-12  # the solver ends close by, on either side, and a budget must not be missed by that
        while not self.allows(Account().add(multiplier, times=releases)):
            multiplier *= 1 + step
            step *= 2
        return multiplier


@dataclass(frozen=True)
class Ledger:
    """One client's account, and what its last releases looked like.

    A turn that is run again after a failure sends the same bytes again, noise included, which tells nothing more and is
    not counted again. Digests are of what was *sent*, never of what the noise hides.

    Attributes:
        account: of all releases.
        last: digests of the releases of the last turn.
        round: in which that was; -1 before the first.

    Example:
        >>> ledger = Ledger().after({"digest 1": 4.0, "digest 2": 8.0}, round=0)
        >>> ledger.after({"digest 1": 4.0}, round=0).account.releases  # the same bytes once more
        ((4.0, 1), (8.0, 1))
        >>> ledger.after({"digest 3": 4.0}, round=1).account.releases
        ((4.0, 2), (8.0, 1))
    """

    account: Account = Account()
    last: tuple[str, ...] = ()
    round: int = -1

    def after(self, releases: Mapping[str, float], *, round: int) -> Ledger:
        """The ledger after a turn's releases.

        Args:
            releases: noise multipliers by digest.
            round: of the turn.

        Returns:
            This very ledger if nothing new is released.
        """
        account, new = self.account, [digest for digest in releases if digest not in self.last]
        for digest in new:
            account = account.add(releases[digest])
        return Ledger(account, tuple(releases), round) if new else self

    def dump(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint."""
        return {"account": [list(pair) for pair in self.account.releases], "last": list(self.last), "round": self.round}

    @staticmethod
    def load(entry: Mapping[str, Any]) -> Ledger:
        """Undo `dump`."""
        releases = tuple((float(multiplier), int(count)) for multiplier, count in entry["account"])
        return Ledger(Account(releases), tuple(entry["last"]), int(entry["round"]))


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
