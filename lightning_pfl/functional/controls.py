"""Weight policies that no method would use: controls that tell what exchange and relevance do in a comparison.

`Alone` keeps a method's structure and takes away the exchange; `Shuffled` keeps that and takes away its meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from lightning_pfl.functional.colora import seed_from
from lightning_pfl.functional.relevance import Peers, Softmax, WeightPolicy

__all__ = ["Alone", "Shuffled"]


@final
@dataclass(frozen=True)
class Alone(WeightPolicy):
    """Every row is the client's own: a mixture with all that belongs to it, but nobody else in it.

    The control that tells what exchange does from what the structure around it does.

    Example:
        >>> Alone().rows(Peers.fresh(["a", "b"]))
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """

    @property
    def needs_sketches(self) -> bool:
        """False."""
        return False

    def rows(self, peers: Peers) -> Tensor:
        """The identity."""
        return torch.eye(len(peers.client_ids), dtype=torch.float64)


@final
@dataclass(frozen=True)
class Shuffled(WeightPolicy):
    """Another policy's weights, handed to the wrong clients: rows as concentrated as they were, and without meaning.

    Each row's weights of the others are permuted among those that have any, in an order that depends on the seed and
    the row's client alone, so that it is the same in every round while the same clients are there. A client's own
    weight stays its own.

    Args:
        of: the policy whose rows are shuffled.
        seed: of the order.

    Example:
        >>> from lightning_pfl.functional.relevance import SampleCount
        >>> peers = Peers.fresh(["a", "b", "c"], num_examples=[1, 1, 3])
        >>> SampleCount().rows(peers)[0], Shuffled(SampleCount(), seed=2).rows(peers)[0]
        (tensor([0.0000, 0.2500, 0.7500], dtype=torch.float64), tensor([0.0000, 0.7500, 0.2500], dtype=torch.float64))
    """

    of: WeightPolicy = field(default_factory=Softmax)
    seed: int = 0

    @property
    def needs_sketches(self) -> bool:
        """Whether the policy that is shuffled needs them."""
        return self.of.needs_sketches

    def rows(self, peers: Peers) -> Tensor:
        """The other policy's rows, permuted."""
        rows = self.of.rows(peers).clone()
        for index, client in enumerate(peers.client_ids):
            others = [other for other in rows[index].nonzero().flatten().tolist() if other != index]
            generator = torch.Generator().manual_seed(seed_from(self.seed, client))
            order = torch.randperm(len(others), generator=generator)
            rows[index, others] = rows[index, others][order]
        return rows
