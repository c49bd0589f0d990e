"""`Ledgers`: what the server knows of what clients have told with noise so far. No more than what they have sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from lightning_pfl.errors import CheckpointMismatchError
from lightning_pfl.federation.metrics import client_name
from lightning_pfl.federation.privacy import Permit, Privacy, charged, require_room
from lightning_pfl.federation.store import ClientStore
from lightning_pfl.functional.accounting import Ledger
from lightning_pfl.types import ClientUpdate

__all__ = ["Ledgers"]

_EPSILON = "privacy/epsilon"


@final
class Ledgers:
    """One ledger per client that has sent something.

    An update counts from the moment when it is there, whatever becomes of its round: a round that fails takes back
    what the clients have learned, and not what the server has seen.

    Args:
        privacy: of the run; None: nothing is noised, and nothing counted.
    """

    def __init__(self, privacy: Privacy | None) -> None:
        self._privacy = privacy
        self._by_client: dict[str, Ledger] = {}

    def of(self, client_id: str) -> Ledger:
        """One client's."""
        return self._by_client.get(client_id, Ledger())

    def epsilon(self, client_id: str) -> float:
        """What one client has spent, at the budget's delta; 0 where nothing is noised."""
        return 0.0 if self._privacy is None else self.of(client_id).account.epsilon(self._privacy.budget.delta)

    def permit(self, client_id: str, store: ClientStore) -> Permit | None:
        """What a client's turn needs to send something; None where nothing is noised."""
        if self._privacy is None:
            return None
        key = self._privacy.key(client_id, b"" if self._privacy.seed is not None else store.secret(client_id))
        return Permit(self._privacy, key, self.of(client_id))

    def require_room(self, client_ids: Sequence[str], round: int) -> None:
        """Check before a round that its clients may send what it asks of them.

        Raises:
            PrivacyBudgetError: one of them may not.
        """
        if self._privacy is not None:
            for client_id in client_ids:
                require_room(self.of(client_id), self._privacy, client_id, round)

    def charge(self, update: ClientUpdate) -> None:
        """Count an update that has come."""
        if self._privacy is not None:
            self._by_client[update.client_id] = charged(self.of(update.client_id), update, self._privacy)

    def metrics(self) -> dict[str, float]:
        """Epsilon spent: of each client that has sent something, and the highest of all."""
        spent = {client_id: self.epsilon(client_id) for client_id in sorted(self._by_client)}
        named = {client_name(client_id, _EPSILON): value for client_id, value in spent.items()}
        return {_EPSILON: max(spent.values()), **named} if spent else {}

    def state_dict(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint."""
        if self._privacy is None:
            return {}
        return {
            "unit": self._privacy.unit,
            "noised": sorted(self._privacy.multipliers),
            "ledgers": {client_id: ledger.dump() for client_id, ledger in self._by_client.items()},
        }

    def check(self, saved: Mapping[str, Any], *, started: bool) -> None:
        """Check that an account can go on.

        Args:
            saved: from `state_dict`.
            started: whether a round had counted by then.

        Raises:
            CheckpointMismatchError: another unit or other releases were noised, so that one account for both would
                claim what is not so.
        """
        if not started and not saved.get("ledgers"):
            return
        before = (saved["unit"], saved["noised"]) if saved else None
        now = (self._privacy.unit, sorted(self._privacy.multipliers)) if self._privacy is not None else None
        if before != now:
            raise CheckpointMismatchError(
                f"In the checkpoint's run {_said(before)}, and in this one {_said(now)}; an account of both would "
                "claim what does not hold. Resume with the same kind of `FederatedStrategy(privacy=...)` (noise "
                "multipliers and budget may differ), or start anew."
            )

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Undo `state_dict`."""
        self._by_client = {client_id: Ledger.load(entry) for client_id, entry in saved.get("ledgers", {}).items()}


def _said(what: tuple[str, Sequence[str]] | None) -> str:
    return "nothing is noised" if what is None else f"noise on every {' and '.join(what[1])} hides {what[0]}"
