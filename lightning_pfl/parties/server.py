"""`Server`: one round of parties that exchange files. Updates in, one signed mixture per party out.

Start at `Server.round`. It needs neither a Trainer nor Ray. What the server knows lies in a folder of its own, which
nobody else may write to; a round is written there before any mixture is published, so that a server that dies between
the two publishes the very same mixtures when it is started again.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import fsspec
import torch

from lightning_pfl.aggregation import Aggregator, RelevanceAggregator, UniformAggregator
from lightning_pfl.aggregation.guard import Expectation, Inspection
from lightning_pfl.aggregation.memory import dump_flat, load_flat
from lightning_pfl.documents import FIT_FOR_A_PATH, SHA256, Schema
from lightning_pfl.errors import CheckpointMismatchError, FederationError, RejectedUpdateError
from lightning_pfl.parties.mailbox import Letter, Mailbox, Sealed, WrongMessageError, write_whole
from lightning_pfl.parties.messages import MIXTURE, Mixture, Update
from lightning_pfl.parties.roster import Roster
from lightning_pfl.parties.signatures import Signer
from lightning_pfl.types import FlatTensors, Layout, Personalized, SharedTensors

__all__ = ["RoundOutcome", "Server"]

_LOG = logging.getLogger(__name__)
_STATE = Schema(
    "A server's state",
    {
        "type": "object",
        "required": ["format", "run", "file", "sha256"],
        "additionalProperties": False,
        "properties": {
            "format": {"const": 1},
            "run": {"type": "string", "pattern": FIT_FOR_A_PATH},
            "file": {"type": "string", "pattern": r"^round-[0-9]{5,}\.pt\Z"},
            "sha256": SHA256,
        },
    },
)


@final
@dataclass(frozen=True, eq=False)
class RoundOutcome:
    """What came of a round.

    Attributes:
        round: from 0.
        counted: parties whose updates were mixed.
        rejected: why others' did not count, by party.
        absent: parties that sent nothing.
        notes: what the log should say.
    """

    round: int
    counted: tuple[str, ...]
    rejected: Mapping[str, str]
    absent: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(eq=False)
class _State:
    """All that the server knows between rounds."""

    round: int = 0
    rule: str | None = None
    aggregator: Mapping[str, Any] = field(default_factory=dict)
    measures: Mapping[str, Any] = field(default_factory=dict)
    known: dict[str, dict[str, Any]] = field(default_factory=dict)  # architecture and layouts, by party
    sketch_size: int | None = None
    issued: dict[str, str] = field(default_factory=dict)  # digest of the last manifest, by party
    started_from: dict[str, Any] = field(default_factory=dict)  # what parties were told to start from
    outbox: dict[str, list[torch.Tensor]] = field(default_factory=dict)  # the last round's messages, by party


@final
class Server:
    """Mixes what parties send.

    Args:
        roster: who takes part.
        mailbox: where messages lie.
        state: folder of the server's own, or any URL that fsspec knows.
        signer: with the server's key.
        aggregator: the rule. None: `RelevanceAggregator` if an update of the first round carries a sketch, else
            `UniformAggregator`.

    Raises:
        ValueError: the key is not the roster's, or the rule and the roster disagree on the global adapter.
    """

    def __init__(
        self,
        roster: Roster,
        mailbox: Mailbox,
        state: str | os.PathLike[str],
        signer: Signer,
        *,
        aggregator: Aggregator | None = None,
    ) -> None:
        if signer.public_key != roster.server:
            raise ValueError(
                f"The key given is {signer.public_key}, but the roster of run `{roster.run}` names {roster.server} as "
                "the server's. Parties would refuse what it signs."
            )
        if aggregator is not None:
            _require_agreement(aggregator, roster)
        self._roster = roster
        self._mailbox = mailbox
        self._signer = signer
        self._aggregator = aggregator
        self._files, root = fsspec.core.url_to_fs(os.fspath(state))
        self._root = root.rstrip("/")

    def round(self, *, quorum: int | None = None) -> RoundOutcome:
        """Run the next round: verify, inspect, mix, publish.

        Args:
            quorum: how many parties must have sent an update that counts; None: all of the roster.

        Returns:
            What came of it. Each party of the roster then finds a mixture, also one that sent nothing.

        Raises:
            FederationError: below the quorum; nothing has changed, and the message says who is missing and why.
            RejectedUpdateError: the aggregator's guard is strict and an update does not count.
            CheckpointMismatchError: the server's state is damaged, of another run, or of another rule.
        """
        state = self._load()
        self._publish(state)
        wanted = len(self._roster.parties) if quorum is None else quorum
        if not 1 <= wanted <= len(self._roster.parties):
            raise ValueError(f"`quorum` must lie between 1 and {len(self._roster.parties)} parties, but is {quorum}.")
        letters, updates, rejected = self._collect(state)
        aggregator = self._rule(state, updates)
        inspection = self._inspect(state, aggregator, updates)
        rejected |= inspection.rejected
        counted = tuple(update.client_id for update in inspection.accepted)
        absent = tuple(sorted(set(self._roster.parties) - set(letters) - set(rejected)))
        if len(counted) < wanted:
            reasons = [f"`{party}` has sent nothing" for party in absent]
            reasons += [f"`{party}`: {why}" for party, why in rejected.items()]
            raise FederationError(
                f"Round {state.round} has {len(counted)} updates that count and needs {wanted}: {'; '.join(reasons)}. "
                "Wait for them, or go on without them with a lower quorum."
            )
        if rejected and aggregator.guard.strict:
            told = "; ".join(f"`{party}`: {why}" for party, why in rejected.items())
            raise RejectedUpdateError(f"These updates of round {state.round} do not count: {told}.")
        aggregation = aggregator.aggregate(inspection.accepted, state.aggregator)
        notes = (*inspection.notes, *aggregation.notes)
        following = _State(
            round=state.round + 1,
            rule=type(aggregator).__name__,
            aggregator=aggregation.state,
            measures=inspection.measures,
            known={**state.known, **{u.client_id: _known(updates[u.client_id]) for u in inspection.accepted}},
            sketch_size=next(
                (u.sketch.numel() for u in inspection.accepted if u.sketch is not None), state.sketch_size
            ),
            issued=dict(state.issued),
        )
        for party in sorted(self._roster.parties):
            personalized = aggregation.personalized.get(party, aggregation.newcomer)
            mixture = Mixture(
                run=self._roster.run,
                party=party,
                round=state.round,
                previous=state.issued.get(party, self._roster.digest),
                update=letters[party].digest if party in counted else None,
                content=personalized,
                notes=(f"Your update did not count: {rejected[party]}",) if party in rejected else (),
            )
            sealed = Sealed.of(mixture, self._signer)
            following.issued[party] = sealed.digest
            following.outbox[party] = [_as_tensor(b) for b in (sealed.manifest, sealed.signature, sealed.tensors)]
            following.started_from[party] = _dumped(
                _start(updates[party] if party in counted else None, personalized, state.started_from.get(party))
            )
        self._save(following)
        self._publish(following)
        for note in notes:
            _LOG.info("Round %d: %s", state.round, note)
        for party, why in rejected.items():
            _LOG.warning("Round %d: the update of `%s` did not count: %s", state.round, party, why)
        return RoundOutcome(state.round, counted, rejected, absent, notes)

    def _collect(self, state: _State) -> tuple[dict[str, Letter], dict[str, Update], dict[str, str]]:
        """Messages that are what they claim to be, and why others are not. One bad message stops nobody else's."""
        letters: dict[str, Letter] = {}
        updates: dict[str, Update] = {}
        rejected: dict[str, str] = {}
        for party in sorted(self._roster.parties):
            try:
                letter = self._mailbox.update(party, state.round)
                if letter is None:
                    continue
                previous = state.issued.get(party, self._roster.digest)
                if letter.manifest["previous"] != previous:
                    raise WrongMessageError(
                        f"it follows the manifest {letter.manifest['previous'][:12]}..., but the last one for this "
                        f"party is {previous[:12]}...: the party has not taken in the last mixture, or has another "
                        "roster"
                    )
                updates[party] = self._mailbox.read_update(letter)
                letters[party] = letter
            except (FederationError, ValueError) as error:
                rejected[party] = str(error).rstrip(".")
        aligned = {party: update.base.aligned for party, update in updates.items() if update.base is not None}
        if len(set(aligned.values())) > 1:
            raise FederationError(
                f"P and Q mean the same on all parties only if all or none have aligned bases, but {aligned} differ. "
                "Give all of them one alignment: `CoLoRA(aligned=...)`."
            )
        return letters, updates, rejected

    def _rule(self, state: _State, updates: Mapping[str, Update]) -> Aggregator:
        if self._aggregator is not None:
            chosen = self._aggregator
        elif state.rule in (None, RelevanceAggregator.__name__, UniformAggregator.__name__):
            sketched = any(update.content.sketch is not None for update in updates.values())
            related = state.rule == RelevanceAggregator.__name__ or (state.rule is None and sketched)
            chosen = _by_relevance(self._roster) if related else UniformAggregator()
            _require_agreement(chosen, self._roster)
        else:
            raise ValueError(f"The rounds before were mixed with `{state.rule}`. Pass that aggregator again.")
        if state.rule is not None and state.rule != type(chosen).__name__:
            raise CheckpointMismatchError(
                f"The rounds before were mixed with `{state.rule}`, and `{type(chosen).__name__}` cannot go on with "
                "what that remembers. Pass the same aggregator in every round."
            )
        return chosen

    def _inspect(self, state: _State, aggregator: Aggregator, updates: Mapping[str, Update]) -> Inspection:
        expected = {}
        for party in updates:
            known = state.known.get(party)
            expected[party] = Expectation(
                round=state.round,
                architecture=None if known is None else known["architecture"],
                layouts=None if known is None else (_layout(known["common"]), _layout(known["same_architecture"])),
                start=_loaded_start(state.started_from.get(party)),
                sketch_size=state.sketch_size,
            )
        contents = [update.content for update in updates.values()]
        return aggregator.guard.inspect(contents, expected=expected, measures=state.measures)

    # -- the server's own folder ---------------------------------------------------------------------------------------

    def _load(self) -> _State:
        try:
            about = _STATE.read(self._files.cat_file(f"{self._root}/state.json"), f"{self._root}/state.json")
        except FileNotFoundError:
            return _State()
        if about["run"] != self._roster.run:
            raise CheckpointMismatchError(
                f"The server's state in {self._root} is of run `{about['run']}`, but the roster is of "
                f"`{self._roster.run}`. Give each run a folder of its own."
            )
        path = f"{self._root}/{about['file']}"
        try:
            content: bytes = self._files.cat_file(path)
        except FileNotFoundError:
            content = b""
        if hashlib.sha256(content).hexdigest() != about["sha256"]:
            raise CheckpointMismatchError(
                f"The server's state is damaged: {path} must have the sha256 {about['sha256'][:12]}..., but has not "
                f"({len(content)} bytes). Put back a copy of the folder."
            )
        return _State(**torch.load(io.BytesIO(content), weights_only=True))

    def _save(self, state: _State) -> None:
        stream = io.BytesIO()
        torch.save(vars(state), stream)
        content = stream.getvalue()
        name = f"round-{state.round:05d}.pt"
        about = {
            "format": 1,
            "run": self._roster.run,
            "file": name,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        self._files.makedirs(self._root, exist_ok=True)
        write_whole(self._files, f"{self._root}/{name}", content)
        write_whole(self._files, f"{self._root}/state.json", json.dumps(about, indent=2).encode() + b"\n")
        older = f"{self._root}/round-{state.round - 2:05d}.pt"  # one before is kept, as a way back
        if self._files.exists(older):
            self._files.rm_file(older)

    def _publish(self, state: _State) -> None:
        for party, parts in state.outbox.items():
            manifest, signature, tensors = (part.numpy().tobytes() for part in parts)
            if party in self._roster.parties and self._mailbox.mixture(party, state.round - 1) is None:
                self._mailbox.write(Sealed(manifest, signature, tensors), MIXTURE, party, state.round - 1)


def _by_relevance(roster: Roster) -> RelevanceAggregator:
    """In the form in which the parties train: beside a frozen adapter, or with their own pulled."""
    return RelevanceAggregator(pull=0, global_branch=True) if roster.global_branch else RelevanceAggregator()


def _require_agreement(aggregator: Aggregator, roster: Roster) -> None:
    if aggregator.uses_global_branch != roster.global_branch:
        says = "a" if aggregator.uses_global_branch else "no"
        raise ValueError(
            f"`{type(aggregator).__name__}` sends {says} frozen global adapter, but the roster says "
            f"global_branch={roster.global_branch}, by which the parties train. Make them agree before the first round."
        )


def _start(update: Update | None, sent: Personalized, before: Mapping[str, Any] | None) -> SharedTensors | None:
    """The values from which a party sets out next: the last that counted, under what it is told to start from."""
    own = update.content.shared if update is not None else _loaded_start(before)
    if own is None or sent.start is None:
        return own or sent.start
    return SharedTensors(
        common=FlatTensors.pack({**own.common.unpack(), **sent.start.common.unpack()}),
        same_architecture=FlatTensors.pack({**own.same_architecture.unpack(), **sent.start.same_architecture.unpack()}),
    )


def _dumped(shared: SharedTensors | None) -> dict[str, Any] | None:
    if shared is None:
        return None
    return {"common": dump_flat(shared.common), "same_architecture": dump_flat(shared.same_architecture)}


def _loaded_start(entry: Mapping[str, Any] | None) -> SharedTensors | None:
    return None if entry is None else SharedTensors(load_flat(entry["common"]), load_flat(entry["same_architecture"]))


def _known(update: Update) -> dict[str, Any]:
    shared = update.content.shared
    layouts = {"common": shared.common.layout, "same_architecture": shared.same_architecture.layout}
    return {
        "architecture": update.content.architecture,
        **{part: [list(layout.names), [list(shape) for shape in layout.shapes]] for part, layout in layouts.items()},
    }


def _layout(entry: list[Any]) -> Layout:
    names, shapes = entry
    return Layout(tuple(names), tuple(tuple(shape) for shape in shapes))


def _as_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
