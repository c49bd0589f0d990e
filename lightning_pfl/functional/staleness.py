r"""Weights for what is old: `staleness_weight` for a number of rounds, `Fading` for a whole policy of mixtures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from lightning_pfl.functional.relevance import Peers, Softmax, WeightPolicy

__all__ = ["Fading", "staleness_weight"]


def staleness_weight(rounds: int, exponent: float) -> float:
    r"""How much something counts that is some rounds old, :math:`(1 + s)^{-a}`.

    Args:
        rounds: s, its age, at least 0.
        exponent: a, at least 0; 0 lets everything count alike.

    Raises:
        ValueError: a negative number.

    Source:
        FedBuff, Nguyen et al., AISTATS 2022, arXiv:2106.06639, with a = 0.5.

    Example:
        >>> [staleness_weight(rounds, 0.5) for rounds in (0, 3)]
        [1.0, 0.5]
    """
    if rounds < 0 or not exponent >= 0:
        raise ValueError(f"An age and its exponent must not be negative, but are {rounds} and {exponent}.")
    return float((1 + rounds) ** -exponent)


@final
@dataclass(frozen=True)
class Fading(WeightPolicy):
    r"""Lets old uploads count less in the rows of another policy, by :math:`(1 + s)^{-a}` for s rounds.

    Where ``max_staleness`` of an aggregator cuts, this fades. A client's weight in its own row does not fade.

    Args:
        of: the policy whose rows are weighed.
        exponent: a, at least 0.

    Raises:
        ValueError: a negative exponent.

    Source:
        FedBuff, Nguyen et al., AISTATS 2022, arXiv:2106.06639, weighs late updates so; applied to mixtures it is ours.

    Example:
        >>> from lightning_pfl.functional.relevance import Uniform
        >>> peers = Peers(("a", "b", "c"), (1, 1, 1), (True,) * 3, ages=(0, 0, 3))
        >>> Fading(Uniform()).rows(peers)[0]  # 1 : 1/2
        tensor([0.0000, 0.6667, 0.3333], dtype=torch.float64)
    """

    of: WeightPolicy = field(default_factory=Softmax)
    exponent: float = 0.5

    def __post_init__(self) -> None:
        staleness_weight(0, self.exponent)

    @property
    def needs_sketches(self) -> bool:
        """Whether the policy that is weighed needs them."""
        return self.of.needs_sketches

    def rows(self, peers: Peers) -> Tensor:
        """The other policy's rows, weighed and scaled to sum to 1."""
        rows = self.of.rows(peers)
        ages = peers.ages or (0,) * len(peers.client_ids)
        faded = torch.tensor([staleness_weight(age, self.exponent) for age in ages], dtype=torch.float64)
        own = torch.eye(len(ages), dtype=torch.bool)
        masses = rows * torch.where(own, 1.0, faded.expand(len(ages), -1))
        return masses / masses.sum(dim=1, keepdim=True)
