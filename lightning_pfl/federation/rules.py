"""`RoundRules`: how long a round waits, for how many, and what becomes of the rest.

Start at `RoundRules`. What to do with results that come too late and with a round that has too few are objects
(`LateResults`, `BelowQuorum`), so that a user can write another. Nothing here waits or runs anything; `gathering` does.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import final

__all__ = [
    "BelowQuorum",
    "Decision",
    "DropLate",
    "LateResults",
    "RetryRound",
    "RoundRules",
    "Shortfall",
    "SkipRound",
    "StopRun",
    "UseLate",
]


class LateResults(ABC):
    """What becomes of clients that have not delivered when a round ends."""

    @abstractmethod
    def waits(self, rounds_late: int) -> bool:
        """Whether a client is left at work for one more round.

        Args:
            rounds_late: 0 at the end of the round in which it was asked, then 1, 2, ...

        Returns:
            True: its result, if it comes, joins the round in which it comes, and the client is not asked meanwhile.
            False: its turn is cancelled, and the client goes on from where it was before.
        """


@final
@dataclass(frozen=True)
class DropLate(LateResults):
    """Late clients are cancelled; their work is lost and their private state is that of their last whole turn."""

    def waits(self, rounds_late: int) -> bool:
        """Never."""
        return False


@final
@dataclass(frozen=True)
class UseLate(LateResults):
    """Late clients go on, and what they send joins a later round.

    Aggregators see by `ClientUpdate.round` how old an update is (``max_staleness``); `FedAvg` weighs it like any other.

    Args:
        max_rounds: so many rounds later at most; then the client is cancelled.

    Raises:
        ValueError: `max_rounds` below 1.

    Example:
        >>> UseLate(max_rounds=1).waits(0), UseLate(max_rounds=1).waits(1)
        (True, False)
    """

    max_rounds: int = 1

    def __post_init__(self) -> None:
        if self.max_rounds < 1:
            raise ValueError(f"`max_rounds` must be at least 1, but is {self.max_rounds}. For 0 take `DropLate()`.")

    def waits(self, rounds_late: int) -> bool:
        """Until it is too old."""
        return rounds_late < self.max_rounds


class Decision(Enum):
    """What follows from a round with too few updates."""

    RETRY = auto()
    """Ask those that are missing again, with a new deadline; what has come stays."""
    SKIP = auto()
    """Nothing of the round counts: no mixing, and every client goes on from where it was before."""
    STOP = auto()
    """The run ends with an error; the last checkpoint has the last whole round."""


@dataclass(frozen=True)
class Shortfall:
    """A round with too few updates.

    Attributes:
        round: from 0.
        attempt: how often its clients were asked, from 1.
        needed: how many updates it must have.
        got: how many there are.
        missing: why the others are not there, by client id.
    """

    round: int
    attempt: int
    needed: int
    got: int
    missing: Mapping[str, str]

    def __str__(self) -> str:
        reasons = "; ".join(f"`{client}` {why}" for client, why in list(self.missing.items())[:8])
        more = f"; and {len(self.missing) - 8} more" if len(self.missing) > 8 else ""
        return f"Round {self.round} has {self.got} of the {self.needed} updates that it needs ({reasons}{more})"


class BelowQuorum(ABC):
    """Decides about a round with too few updates."""

    @abstractmethod
    def decide(self, shortfall: Shortfall) -> Decision:
        """What to do now."""


@final
@dataclass(frozen=True)
class StopRun(BelowQuorum):
    """The run ends: with `ClientFailedError` if a client failed, else with `FederationError`."""

    def decide(self, shortfall: Shortfall) -> Decision:
        """Stop."""
        return Decision.STOP


@final
@dataclass(frozen=True)
class SkipRound(BelowQuorum):
    """The round counts for nothing, and the next one begins."""

    def decide(self, shortfall: Shortfall) -> Decision:
        """Skip."""
        return Decision.SKIP


@final
@dataclass(frozen=True)
class RetryRound(BelowQuorum):
    """Clients that are missing are asked again.

    Args:
        times: how often.
        then: decides when that has not helped.

    Raises:
        ValueError: `times` below 1.

    Example:
        >>> rule = RetryRound(times=1, then=SkipRound())
        >>> [rule.decide(Shortfall(0, attempt, 3, 2, {})).name for attempt in (1, 2)]
        ['RETRY', 'SKIP']
    """

    times: int = 1
    then: BelowQuorum = field(default_factory=StopRun)

    def __post_init__(self) -> None:
        if self.times < 1:
            raise ValueError(f"`times` must be at least 1, but is {self.times}. Not to retry, take `{self.then}`.")

    def decide(self, shortfall: Shortfall) -> Decision:
        """Retry, then ask the other."""
        return Decision.RETRY if shortfall.attempt <= self.times else self.then.decide(shortfall)


@final
@dataclass(frozen=True, kw_only=True)
class RoundRules:
    """How a round deals with clients that are slow, hung, lost or gone.

    By default a round waits for everybody, and a client that fails ends the run: going on without it changes what the
    others learn, so a user should say that this is fine.

    Args:
        deadline: seconds from the moment when clients are asked (and places are ready). None: no limit. The same limit
            holds for evaluating clients.
        quorum: which share of the wanted updates must count (after the guard) for the round to count, above 0 to 1.
            With a number, a client that fails, is late or is left out by the guard is only missing. None: every client
            must deliver; whom the guard leaves out has delivered.
        over_select: which share of clients to ask beyond those wanted (`FederatedStrategy.fraction`). The round ends
            when as many as are wanted have delivered; the rest is late.
        late: what becomes of those that are late.
        below_quorum: what becomes of a round with too few.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> rules = RoundRules(deadline=600, quorum=0.8, below_quorum=RetryRound(then=SkipRound()))
        >>> rules.needed(wanted=10), RoundRules().needed(wanted=10)
        (8, 10)
    """

    deadline: float | None = None
    quorum: float | None = None
    over_select: float = 0.0
    late: LateResults = field(default_factory=DropLate)
    below_quorum: BelowQuorum = field(default_factory=StopRun)

    def __post_init__(self) -> None:
        if self.deadline is not None and not 0 < self.deadline < math.inf:
            raise ValueError(f"`deadline` is a number of seconds above 0, or None, but is {self.deadline}.")
        if self.quorum is not None and not 0 < self.quorum <= 1:
            raise ValueError(f"`quorum` is a share of the wanted updates, above 0 to 1, but is {self.quorum}.")
        if not 0 <= self.over_select < math.inf:
            raise ValueError(f"`over_select` is a share of clients, at least 0, but is {self.over_select}.")
        for name, kind in (("late", LateResults), ("below_quorum", BelowQuorum)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"`{name}` must be a {kind.__name__}, but is {getattr(self, name)!r}.")

    def needed(self, wanted: int) -> int:
        """How many updates a round must have of those that it wants."""
        return wanted if self.quorum is None else max(1, math.ceil(self.quorum * wanted - 1e-9))
