"""The interface of a server rule: updates in, what every client receives out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_pfl.aggregation.conventional import ConventionalMean, FactorMean
from lightning_pfl.aggregation.guard import UpdateGuard
from lightning_pfl.functional.averaging import weighted_mean
from lightning_pfl.types import Aggregation, ClientUpdate, Personalized, SharedTensors

__all__ = ["Aggregator", "Welcome", "WelcomingAggregator"]


class Aggregator(ABC):
    """Mixes what clients send into what each of them receives.

    An aggregator holds settings only. What it must remember from round to round travels in ``state``, so that the
    strategy can save it and a resumed run gives the same bits.

    Attributes:
        guard: what an update must satisfy to count. The engine asks it before it calls `aggregate`.
        conventional: how A and B are averaged within an architecture, where the rule takes means of them.
    """

    guard: UpdateGuard = UpdateGuard()
    conventional: ConventionalMean = FactorMean()

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

    def center(self, updates: Sequence[ClientUpdate]) -> SharedTensors:
        """One value for the clients of one architecture: what the module on the driver shows, and a checkpoint of it.

        Here the mean weighted by examples; no client receives it.

        Args:
            updates: at least one, all of one architecture.
        """
        counts = [update.num_examples for update in updates]
        return SharedTensors(
            common=weighted_mean([update.shared.common for update in updates], counts),
            same_architecture=self.conventional.one(
                [update.shared.same_architecture for update in updates], counts
            ).flats[0],
        )


@dataclass(frozen=True, eq=False)
class Welcome:
    """What a client receives that took no part in training.

    Attributes:
        personalized: its mixture of the others.
        weights: how that mixture weighs them, by client id; those that count nothing are left out.
        notes: what the log should say (a uniform mixture for lack of a sketch, uploads that are too old).
    """

    personalized: Personalized
    weights: Mapping[str, float]
    notes: Sequence[str] = ()


class WelcomingAggregator(Aggregator):
    """A rule that can make a mixture for a client after training, from what the others have last sent."""

    @abstractmethod
    def welcome(self, newcomer: ClientUpdate, state: Mapping[str, Any]) -> Welcome:
        """Mix the known clients' uploads for a client that has trained nothing.

        Args:
            newcomer: what it would send before its first turn: its names and shapes, its architecture and, if there
                is one, the sketch of its task. Its values are in no mixture, except where nobody else holds a name.
            state: the ``state`` of the last `Aggregation`; left alone.

        Returns:
            What it receives. The known clients' mixtures do not change.

        Raises:
            ValueError: nobody has sent anything yet, the newcomer has the id of a known client, it does not fit the
                others, or the rule does not know what to do with it.
        """
