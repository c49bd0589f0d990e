"""`LocalOnly`: nobody receives anything; what every federated method has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from lightning_pfl.aggregation.base import Aggregator
from lightning_pfl.aggregation.guard import UpdateGuard
from lightning_pfl.aggregation.memory import require_rule
from lightning_pfl.types import Aggregation, ClientUpdate, Personalized

__all__ = ["LocalOnly"]

_RULE = "local-only"


@final
class LocalOnly(Aggregator):
    """Each client trains its one adapter at full scale on its own data, without a global branch.

    Args:
        global_branch: give each client a global branch and its gate all the same, for which nothing is ever sent, so
            that its output stays 0: the control that tells what a branch and a gate do without exchange.
        guard: what an update must satisfy to count; a diverged client is worth an error here too.

    Example:
        >>> LocalOnly().uses_global_branch
        False
    """

    def __init__(self, *, global_branch: bool = False, guard: UpdateGuard | None = None) -> None:
        self.global_branch = global_branch
        self.guard = guard or UpdateGuard()

    @property
    def uses_global_branch(self) -> bool:
        """As the user chose; by default half of the scale is not lost to a branch that stays empty."""
        return self.global_branch

    @property
    def needs_sketches(self) -> bool:
        """False."""
        return False

    def aggregate(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any]) -> Aggregation:
        """Send nothing to anybody."""
        require_rule(state, _RULE)
        accepted = self.guard.accept(updates)
        clients = sorted({*state.get("clients", ()), *(update.client_id for update in accepted)})
        return Aggregation(
            personalized={client: Personalized() for client in clients},
            newcomer=Personalized(),
            state={"rule": _RULE, "clients": clients},
            client_ids=tuple(clients),
        )
