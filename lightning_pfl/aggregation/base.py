"""The interface of a server rule: updates in, what every client receives out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_pfl.types import Aggregation, ClientUpdate

__all__ = ["Aggregator"]


class Aggregator(ABC):
    """Mixes what clients send into what each of them receives.

    An aggregator holds settings only. What it must remember from round to round travels in ``state``, so that the
    strategy can save it and a resumed run gives the same bits.
    """

    @property
    @abstractmethod
    def uses_global_branch(self) -> bool:
        """Whether clients hold a frozen global adapter and a gate beside their own adapter."""

    @property
    @abstractmethod
    def needs_sketches(self) -> bool:
        """Whether updates must carry a relevance sketch."""

    @abstractmethod
    def aggregate(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any]) -> Aggregation:
        """Mix one round's updates.

        Args:
            updates: one per client that took part, any order; the result does not depend on it.
            state: the ``state`` of the last round's `Aggregation`; empty in the first round.

        Returns:
            What each known client receives, and the next state. Inputs are left alone.

        Raises:
            ValueError: updates that this rule cannot mix; the message names the clients and the tensors.
        """
