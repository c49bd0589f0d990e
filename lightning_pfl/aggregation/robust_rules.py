"""Rules by which n clients' vectors become what each of them receives, while up to f of them lie.

Start at `CoordinateMedian` and `ClippedRelevance`. The first three rules make one vector for all; the last makes one
per client, around the client's own adapter, which is the one that it can trust. `RobustAggregator` applies a rule to
every group of tensors that the same clients hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from lightning_pfl.functional.relevance import Peers, Softmax, WeightPolicy
from lightning_pfl.functional.robust import clip_rows, coordinate_median, krum_selection, trimmed_mean

__all__ = ["ClippedRelevance", "CoordinateMedian", "Krum", "Mixed", "RobustRule", "TrimmedMean"]


@dataclass(frozen=True, eq=False)
class Mixed:
    """What came of a group.

    Attributes:
        values: float32, shape ``[n, d]``: what each client receives.
        rows: shape ``[n, n]``: how each row weighs the clients; None where coordinates are chosen one by one.
    """

    values: Tensor
    rows: Tensor | None = None


class RobustRule(ABC):
    """Mixes a group of clients. Leaves are frozen dataclasses: settings, no memory."""

    @property
    def needs_sketches(self) -> bool:
        """Whether `mix` reads `Peers.similarity`."""
        return False

    def least(self, num_attackers: int) -> int:
        """How many clients a group needs, so that this many of them may lie."""
        return 2 * num_attackers + 2

    @abstractmethod
    def mix(self, values: Tensor, peers: Peers, num_attackers: int) -> Mixed:
        """Mix one group of at least `least` sources.

        Args:
            values: float32, shape ``[n, d]``, a row per client.
            peers: the same n clients. Only `Peers.sources` are mixed; all n receive.
            num_attackers: how many of them may lie.
        """


@final
@dataclass(frozen=True)
class CoordinateMedian(RobustRule):
    """The median of every number on its own, the same for all clients.

    Source:
        Yin et al., ICML 2018, arXiv:1803.01498.

    Example:
        >>> values = torch.tensor([[1.0], [2.0], [3.0], [-1e6]])
        >>> CoordinateMedian().mix(values, Peers.fresh(["a", "b", "c", "x"]), 1).values[0]
        tensor([1.5000])
    """

    def mix(self, values: Tensor, peers: Peers, num_attackers: int) -> Mixed:
        """One vector, for everybody."""
        return Mixed(_for_all(coordinate_median(values[_sources(peers)]), values))


@final
@dataclass(frozen=True)
class TrimmedMean(RobustRule):
    """The mean of every number without its f largest and f smallest values, the same for all clients.

    Source:
        Yin et al., ICML 2018, arXiv:1803.01498.

    Example:
        >>> values = torch.tensor([[1.0], [2.0], [4.0], [-1e6]])
        >>> TrimmedMean().mix(values, Peers.fresh(["a", "b", "c", "x"]), 1).values[0]
        tensor([1.5000])
    """

    def mix(self, values: Tensor, peers: Peers, num_attackers: int) -> Mixed:
        """One vector, for everybody."""
        return Mixed(_for_all(trimmed_mean(values[_sources(peers)], num_attackers), values))


@final
@dataclass(frozen=True)
class Krum(RobustRule):
    """The mean of the clients that lie closest to their nearest neighbours, the same for all clients.

    Clients of different tasks lie far apart without lying: with tasks that differ much, the selection is the largest
    family of tasks.

    Args:
        keep: how many to average; 1 is Krum. None: all but the attackers, n - f, the largest Multi-Krum.

    Raises:
        ValueError: `keep` below 1.

    Source:
        Blanchard et al., NeurIPS 2017, arXiv:1703.02757.

    Example:
        >>> values = torch.tensor([[1.0], [2.0], [3.0], [4.0], [-1e6]])
        >>> Krum().mix(values, Peers.fresh(["a", "b", "c", "d", "x"]), 1).values[0]
        tensor([2.5000])
    """

    keep: int | None = None

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"Krum keeps at least one client, but `keep` is {self.keep}.")

    def least(self, num_attackers: int) -> int:
        """2 f + 3, as the paper asks."""
        return 2 * num_attackers + 3

    def mix(self, values: Tensor, peers: Peers, num_attackers: int) -> Mixed:
        """One vector, for everybody."""
        sources = _sources(peers)
        most = len(sources) - num_attackers
        keep = most if self.keep is None else min(self.keep, most)
        chosen = sources[krum_selection(values[sources], num_attackers, keep=keep)].sort().values
        row = torch.zeros(values.shape[0], dtype=torch.float64)
        row[chosen] = 1 / keep
        return Mixed(_for_all(values[chosen].mean(dim=0), values), row.repeat(values.shape[0], 1))


@final
@dataclass(frozen=True)
class ClippedRelevance(RobustRule):
    r"""Every client's own mixture of the others, in which nobody is long and nobody who contradicts the client counts.

    Client i takes :math:`\sum_j w_{ij} c(L_j)`, where c shortens to the median length, and :math:`w_{ij}` is
    proportional to the policy's weight times :math:`\max(0, \cos(L_i, L_j))`. A sketch costs nothing to forge, so
    relevance alone lets a liar into every row; to agree with what a client has learned by itself, one must know it.
    A row of clients that all contradict is the client's own.

    Args:
        weights: the policy that is read before agreement. The default is flatter than `Softmax` itself: agreement
            concentrates the rows once more.
        max_weight: the largest share of a row that one client may have, if there are enough others who count.

    Raises:
        ValueError: `max_weight` out of range.

    Source:
        Agreement with a trusted vector, times length of it: FLTrust, Cao et al., NDSS 2021, arXiv:2012.13995. There
        the server trains the trusted vector; here it is the client's own. The median length and relevance are ours.

    Example:
        >>> values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-9.0, -9.0]])
        >>> peers = Peers.fresh(["a", "b", "c", "x"], similarity=torch.ones(4, 4))
        >>> ClippedRelevance().mix(values, peers, 1).rows[2]
        tensor([0.5000, 0.5000, 0.0000, 0.0000], dtype=torch.float64)
    """

    weights: WeightPolicy = field(default_factory=lambda: Softmax(1.0))
    max_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.max_weight <= 1:
            raise ValueError(f"`max_weight` is a share of a row, above 0 to 1, but is {self.max_weight}.")

    @property
    def needs_sketches(self) -> bool:
        """Whether its policy does."""
        return self.weights.needs_sketches

    def mix(self, values: Tensor, peers: Peers, num_attackers: int) -> Mixed:
        """A vector for each client."""
        norms = torch.linalg.vector_norm(values.double(), dim=1)
        unit = values.double() / norms.where(norms > 0, 1.0)[:, None]
        masses = self.weights.rows(peers) * (unit @ unit.T).clamp(min=0.0)
        totals = masses.sum(dim=1, keepdim=True)
        own = torch.eye(values.shape[0], dtype=torch.float64)
        rows = torch.where(totals > 0, masses / totals.where(totals > 0, 1.0), own)
        if self.max_weight < 1:
            rows = torch.where(totals > 0, _capped(rows, self.max_weight), rows)
        clipped = clip_rows(values, float(norms[_sources(peers)].median()))
        return Mixed(rows.float() @ clipped, rows)


def _sources(peers: Peers) -> Tensor:
    """Rows whose uploads may be mixed."""
    return torch.tensor(peers.sources).nonzero().flatten()


def _for_all(vector: Tensor, values: Tensor) -> Tensor:
    return vector.repeat(values.shape[0], 1)


def _capped(rows: Tensor, limit: float) -> Tensor:
    """Spread what is above the limit over the others in proportion, as far as they have room."""
    capped = rows
    for _ in range(rows.shape[1]):
        full = capped >= limit
        free = torch.where(full, 0.0, capped)
        room = 1 - limit * full.sum(dim=1, keepdim=True)
        total = free.sum(dim=1, keepdim=True)
        spread = torch.where(full, limit, free * room / total.where(total > 0, 1.0))
        if bool((spread <= limit + 1e-12).all()):
            return spread / spread.sum(dim=1, keepdim=True)
        capped = spread
    return capped / capped.sum(dim=1, keepdim=True)
