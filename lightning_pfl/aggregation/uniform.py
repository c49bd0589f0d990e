"""`UniformAggregator`: each client's mixture weighs all others alike, whatever their tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from lightning_pfl.aggregation.base import Welcome, WelcomingAggregator
from lightning_pfl.aggregation.conventional import ConventionalMean
from lightning_pfl.aggregation.guard import UpdateGuard
from lightning_pfl.aggregation.mixture import MixtureAggregator
from lightning_pfl.functional.relevance import Uniform, WeightPolicy
from lightning_pfl.types import Aggregation, ClientUpdate

__all__ = ["UniformAggregator"]


@final
class UniformAggregator(WelcomingAggregator):
    """The mean of the others goes into each client's frozen global adapter; what relevance has to beat.

    Args:
        include_self: whether a client's own adapter counts in its mixture.
        warm_start: the mixture that overwrites a client's own adapter L before its next turn. None: L is never touched.
        global_branch: whether clients hold the frozen global adapter G.
        max_staleness: an upload that is more rounds old than this is not mixed into the others'. None: no limit.
        conventional: how A and B are averaged within an architecture: `ProductMean()` averages what layers compute.
            None: `FactorMean()`, the paper's.
        guard: what an update must satisfy to count.

    Example:
        >>> UniformAggregator().needs_sketches
        False
    """

    def __init__(
        self,
        *,
        include_self: bool = False,
        warm_start: WeightPolicy | None = None,
        global_branch: bool = True,
        max_staleness: int | None = None,
        conventional: ConventionalMean | None = None,
        guard: UpdateGuard | None = None,
    ) -> None:
        self._mixture = MixtureAggregator(
            Uniform(include_self=include_self),
            warm_start=warm_start,
            global_branch=global_branch,
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
        """Whether its policies read similarities; the default's do not."""
        return self._mixture.needs_sketches

    def aggregate(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any]) -> Aggregation:
        """Mix the last known uploads of all clients alike."""
        return self._mixture.aggregate(updates, state)

    def welcome(self, newcomer: ClientUpdate, state: Mapping[str, Any]) -> Welcome:
        """Mix the last known uploads for a client that took no part."""
        return self._mixture.welcome(newcomer, state)
