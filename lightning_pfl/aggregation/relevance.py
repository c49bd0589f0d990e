"""`RelevanceAggregator`: each client's mixture weighs the others by how much their tasks resemble its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from lightning_pfl.aggregation.base import Welcome, WelcomingAggregator
from lightning_pfl.aggregation.conventional import ConventionalMean
from lightning_pfl.aggregation.guard import UpdateGuard
from lightning_pfl.aggregation.mixture import MixtureAggregator
from lightning_pfl.functional.pulling import Towards
from lightning_pfl.functional.relevance import Softmax, WeightPolicy
from lightning_pfl.functional.similarity import Similarity
from lightning_pfl.types import Aggregation, ClientUpdate

__all__ = ["RelevanceAggregator"]


@final
class RelevanceAggregator(WelcomingAggregator):
    """Relevance-aware aggregation: cosines of the clients' sketches decide who takes how much of whom.

    After every round a client's own adapter L is pulled towards a mixture of the others', weighed by relevance. On real
    models of two families this gained two points on own tasks over training alone, over the paper's structure and over
    every other variant that was tried (docs/design/variants.md). `paper` makes the paper's setting: L is never touched,
    and the mixture is a frozen adapter G beside it.

    Args:
        weights: what makes a row of weights of a row of cosines. None: ``Softmax(0.25)``, which standardises each row
            first; the paper's ``Softmax(0.5, standardize=False)`` is nearly uniform.
        pull: how far L is pulled towards the mixture after a round, from 0 (L is never touched) to 1.
        warm_start: a mixture of another kind to overwrite L with instead: ``Uniform(include_self=True)`` for what all
            tasks share. None: as ``pull`` says.
        global_branch: whether clients hold the mixture as a frozen global adapter G beside L, too.
        similarity: how two sketches are compared; `ColumnCosine` is the reference code's way. None: `Cosine()`.
        ema: how much of a client's earlier sketch is kept when a new one comes; the paper's 0.5.
        max_staleness: an upload that is more rounds old than this is not mixed into the others'. None: no limit.
        conventional: how A and B are averaged within an architecture: `ProductMean()` averages what layers compute.
            None: `FactorMean()`, the paper's.
        guard: what an update must satisfy to count.

    Raises:
        ValueError: a pull out of range, or neither a pull nor a warm start nor a global branch.

    Source:
        Co-LoRA, arXiv:2506.11024, relevance-guided aggregation; the pull is ours (`Towards`).

    Example:
        >>> ours, paper = RelevanceAggregator(), RelevanceAggregator.paper()
        >>> ours.needs_sketches, ours.uses_global_branch
        (True, False)
        >>> paper.needs_sketches, paper.uses_global_branch
        (True, True)
    """

    def __init__(
        self,
        weights: WeightPolicy | None = None,
        *,
        pull: float = 0.5,
        warm_start: WeightPolicy | None = None,
        global_branch: bool = False,
        similarity: Similarity | None = None,
        ema: float = 0.5,
        max_staleness: int | None = None,
        conventional: ConventionalMean | None = None,
        guard: UpdateGuard | None = None,
    ) -> None:
        if not 0 <= pull <= 1:
            raise ValueError(f"`pull` must be between 0 and 1, but is {pull}.")
        weights = Softmax(0.25) if weights is None else weights
        if warm_start is None and pull:
            warm_start = Towards(weights, pull)
        if warm_start is None and not global_branch:
            raise ValueError(
                "A mixture must go somewhere: with `pull=0` pass `global_branch=True` (the paper's structure), or take "
                "`LocalOnly()` if nothing is to be mixed."
            )
        self._mixture = MixtureAggregator(
            weights,
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

    @classmethod
    def paper(cls, *, include_self: bool = False, guard: UpdateGuard | None = None) -> RelevanceAggregator:
        """The paper's own setting: plain cosines at temperature 0.5, G frozen beside L, L never touched.

        Args:
            include_self: whether a client's own upload is in its mixture. The paper's sum runs over all clients; the
                reference code leaves the client itself out.
            guard: what an update must satisfy to count.

        Source:
            Co-LoRA, arXiv:2506.11024.
        """
        weights = Softmax(0.5, standardize=False, include_self=include_self)
        return cls(weights, pull=0, global_branch=True, guard=guard)

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
