r"""`Towards`: a step from what a client has towards the mixture of another policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from lightning_pfl.functional.relevance import Peers, Uniform, WeightPolicy

__all__ = ["Towards"]


@final
@dataclass(frozen=True)
class Towards(WeightPolicy):
    r"""Pulls each client towards another policy's mixture, :math:`(1 - a) I + a W`.

    Meant for ``warm_start=``: an adapter that restarts from the mixture itself forgets what it has learned for its own
    task, one that is never touched learns nothing of what all tasks share.

    Args:
        of: the policy whose mixture pulls.
        share: a, above 0 to 1; 1 is the policy itself.

    Raises:
        ValueError: a share out of range.

    Source:
        Ours. It is one step of gradient descent on the proximal term :math:`\|L_i - \sum_j w_{ij} L_j\|^2` of
        personalised federated learning (FedAMP, Huang et al., AAAI 2021), taken by the server between rounds.

    Example:
        >>> peers = Peers.fresh(["a", "b", "c"], num_examples=[1, 1, 1])
        >>> Towards(Uniform(include_self=True), share=0.3).rows(peers)[0]
        tensor([0.8000, 0.1000, 0.1000], dtype=torch.float64)
    """

    of: WeightPolicy = field(default_factory=lambda: Uniform(include_self=True))
    share: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"`share` must be above 0 and at most 1, but is {self.share}.")

    @property
    def needs_sketches(self) -> bool:
        """Whether the policy that pulls needs them."""
        return self.of.needs_sketches

    def rows(self, peers: Peers) -> Tensor:
        """The other policy's rows, blended with the clients themselves; a newcomer has nothing to keep."""
        rows = self.of.rows(peers)
        own = torch.eye(len(rows), dtype=rows.dtype)
        for index, client_id in enumerate(peers.client_ids):
            if client_id in peers.newcomers:
                own[index] = rows[index]
        return torch.lerp(own, rows, self.share)
