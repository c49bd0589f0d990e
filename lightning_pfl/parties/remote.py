"""`RemoteServer`: the rule of a party whose server is elsewhere, for a `FederatedStrategy` of that one client.

The party then trains all rounds in one ``trainer.fit``, with all that the strategy carries over from round to round: at
the end of each the update goes into the mailbox, and the mixture is waited for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from lightning_pfl.aggregation import Aggregator
from lightning_pfl.aggregation.guard import UpdateGuard
from lightning_pfl.aggregation.memory import require_rule
from lightning_pfl.errors import CheckpointMismatchError, FederationError
from lightning_pfl.parties.mailbox import Letter, Mailbox
from lightning_pfl.parties.messages import Update
from lightning_pfl.parties.party import require_key, send
from lightning_pfl.parties.signatures import Signer
from lightning_pfl.types import Aggregation, ClientUpdate, Personalized

__all__ = ["RemoteServer"]

_LOG = logging.getLogger(__name__)
_RULE = "remote"


@final
class RemoteServer(Aggregator):
    """Hands a party's update to a server that it shares files with, and waits for the mixture.

    Args:
        mailbox: with the run's roster.
        party: who this is; the one client of the strategy must have this id.
        signer: with the party's key.
        timeout: seconds to wait for a round's mixture. None: for ever. A run that has given up goes on with
            ``ckpt_path`` later: it trains the round again, to the same bytes, and finds its update sent already.
        poll: seconds between two looks into the mailbox.
        guard: what the party's own update must satisfy before it is sent.

    Raises:
        ValueError: the roster does not know the party, or by another key; a time that is not positive.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_pfl import Client, FederatedStrategy
        >>> from lightning_pfl.parties import Mailbox, RemoteServer, Roster, Signer, make_key
        >>> with TemporaryDirectory() as folder:
        ...     keys = {name: make_key(f"{folder}/{name}.key") for name in ("server", "ward-3")}
        ...     roster = Roster("wards-1", keys["server"], {"ward-3": keys["ward-3"]})
        ...     server = RemoteServer(Mailbox(f"{folder}/box", roster), "ward-3", Signer(f"{folder}/ward-3.key"))
        ...     strategy = FederatedStrategy([Client("ward-3")], aggregator=server)
    """

    def __init__(
        self,
        mailbox: Mailbox,
        party: str,
        signer: Signer,
        *,
        timeout: float | None = None,
        poll: float = 5.0,
        guard: UpdateGuard | None = None,
    ) -> None:
        if poll <= 0 or (timeout is not None and timeout < 0):
            raise ValueError(f"`poll` must be positive and `timeout` not negative, but are {poll} and {timeout}.")
        require_key(mailbox, party, signer)
        self._mailbox = mailbox
        self._party = party
        self._signer = signer
        self._timeout = timeout
        self._poll = poll
        self.guard = guard or UpdateGuard()

    @property
    def uses_global_branch(self) -> bool:
        """As the roster says."""
        return self._mailbox.roster.global_branch

    @property
    def needs_sketches(self) -> bool:
        """No: what the server does without one is its business."""
        return False

    def aggregate(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any]) -> Aggregation:
        """Send the party's update and wait for the mixture.

        Raises:
            FederationError: it has not come in time, or is not what it should be.
        """
        require_rule(state, _RULE)
        roster = self._mailbox.roster
        if state and state["run"] != roster.run:
            raise CheckpointMismatchError(f"The checkpoint is of run `{state['run']}`, the roster of `{roster.run}`.")
        (update,) = self.guard.accept(updates)
        if update.client_id != self._party:
            raise ValueError(
                f"`RemoteServer` speaks for `{self._party}`, but the strategy's client is `{update.client_id}`. Give "
                f"it the one client `Client({self._party!r})`."
            )
        since, previous = state.get("round", 0), state.get("previous", roster.digest)
        ahead = self._mailbox.last_mixture(self._party, since=since, previous=previous)
        if ahead is not None and not self._has_sent(range(since, ahead.manifest["round"] + 1)):
            since, previous, ahead = ahead.manifest["round"] + 1, ahead.digest, None
            _LOG.warning("The server has gone on without `%s`; its update counts in round %d.", self._party, since)
        if ahead is None:
            message = Update(roster.run, previous, replace(update, round=since))
            send(message, self._mailbox, self._signer, overwrite=False)
        letter = self._wait(since, previous)
        mixture = self._mailbox.read_mixture(letter)
        notes = list(mixture.notes)
        if mixture.update is None and not notes:
            notes.append("The server has mixed this round without this party's update.")
        return Aggregation(
            personalized={self._party: mixture.content},
            newcomer=Personalized(),
            state={"rule": _RULE, "run": roster.run, "round": mixture.round + 1, "previous": letter.digest},
            client_ids=(self._party,),
            notes=notes,
        )

    def _has_sent(self, rounds: range) -> bool:
        """Whether an answer may be one to this party; a run that goes on from a checkpoint does not remember."""
        return any(self._mailbox.update(self._party, round) is not None for round in rounds)

    def _wait(self, since: int, previous: str) -> Letter:
        start = time.monotonic()
        while True:
            letter = self._mailbox.last_mixture(self._party, since=since, previous=previous)
            if letter is not None:
                return letter
            waited = time.monotonic() - start
            if self._timeout is not None and waited >= self._timeout:
                raise FederationError(
                    f"The server has not mixed round {since} within {self._timeout:g} seconds. Go on later with "
                    "`trainer.fit(..., ckpt_path='last')`, or raise `timeout`."
                )
            time.sleep(self._poll)
