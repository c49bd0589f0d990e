"""`RelevanceAggregator`: each client's mixture weighs the others by how much their tasks resemble its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from lightning_pfl.aggregation.base import Welcome, WelcomingAggregator
from lightning_pfl.aggregation.conventional import ConventionalMean
from lightning_pfl.aggregation.guard import UpdateGuard
from lightning_pfl.aggregation.mixture import MixtureAggregator
from lightning_pfl.functional.relevance import Softmax, WeightPolicy
from lightning_pfl.functional.similarity import Similarity
from lightning_pfl.types import Aggregation, ClientUpdate

__all__ = ["RelevanceAggregator"]


@final
class RelevanceAggregator(WelcomingAggregator):
    """Relevance-aware aggregation: cosines of the clients' sketches decide who takes how much of whom.

    Args:
        weights: what makes a row of weights of a row of cosines. The paper's is ``Softmax(0.5, standardize=False)``,
            which is nearly uniform; the default standardises each row first.
        warm_start: the mixture that overwrites a client's own adapter L before its next turn:
            ``Uniform(include_self=True)`` for what all tasks share, ``Softmax(include_self=True)`` for what related
            tasks share. None, as in the paper: L is never touched.
        global_branch: whether clients hold the frozen global adapter G.
        similarity: how two sketches are compared; `ColumnCosine` is the reference code's way. None: `Cosine()`.
        ema: how much of a client's earlier sketch is kept when a new one comes; the paper's 0.5.
        max_staleness: an upload that is more rounds old than this is not mixed into the others'. None: no limit.
        conventional: how A and B are averaged within an architecture: `ProductMean()` averages what layers compute.
            None: `FactorMean()`, the paper's.
        guard: what an update must satisfy to count.

    Source:
        Co-LoRA, arXiv:2506.11024, relevance-guided aggregation.

    Example:
        >>> paper = RelevanceAggregator(Softmax(0.5, standardize=False))
        >>> paper.needs_sketches, paper.uses_global_branch
        (True, True)
    """

    def __init__(
        self,
        weights: WeightPolicy | None = None,
        *,
        warm_start: WeightPolicy | None = None,
        global_branch: bool = True,
        similarity: Similarity | None = None,
        ema: float = 0.5,
        max_staleness: int | None = None,
        conventional: ConventionalMean | None = None,
        guard: UpdateGuard | None = None,
    ) -> None:
        self._mixture = MixtureAggregator(
            Softmax() if weights is None else weights,
            warm_start=warm_start,
            global_branch=global_branch,
            similarity=similarity,
            ema=ema,
            max_staleness=max_staleness,
            conventional=conventional,
            guard=guard,
        )
        self.guard = self._mixture.guard
        self.conventional = self._mixture.conventional

    @property
    def uses_global_branch(self) -> bool:
        """As the user chose."""
        return self._mixture.uses_global_branch

    @property
    def needs_sketches(self) -> bool:
        """Whether its policies read similarities; the default's do."""
        return self._mixture.needs_sketches

    def aggregate(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any]) -> Aggregation:
        """Mix the last known uploads of all clients by relevance."""
        return self._mixture.aggregate(updates, state)

    def welcome(self, newcomer: ClientUpdate, state: Mapping[str, Any]) -> Welcome:
        """Mix the last known uploads for a client that took no part."""
        return self._mixture.welcome(newcomer, state)
