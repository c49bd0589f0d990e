"""A party's side of a round: `export` what its checkpoint has learned, `apply` what the server has mixed for it.

Between the two the party trains as it always does, ``trainer.fit(module, data, ckpt_path=...)`` with `CoLoRA` among its
callbacks. Nothing here needs its module, its data or a Trainer.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace

from lightning_pfl.aggregation import UpdateGuard
from lightning_pfl.errors import FederationError
from lightning_pfl.parties.checkpoint import PartyCheckpoint
from lightning_pfl.parties.mailbox import Mailbox, Sealed, WrongMessageError
from lightning_pfl.parties.messages import UPDATE, Mixture, Update
from lightning_pfl.parties.signatures import Signer
from lightning_pfl.types import ClientUpdate

__all__ = ["apply", "export", "require_key", "send"]

_LOG = logging.getLogger(__name__)


def export(
    checkpoint: str | os.PathLike[str],
    mailbox: Mailbox,
    party: str,
    signer: Signer,
    *,
    num_examples: int,
    overwrite: bool = False,
) -> Update:
    """Sign what a party has trained since the last round, and put it where the server looks for it.

    Args:
        checkpoint: of its Trainer, any fsspec URL; left alone.
        mailbox: with the run's roster.
        party: who sends.
        signer: with the party's key.
        num_examples: on how many it trained; its weight in sample-weighted means.
        overwrite: replace an update of this round that was sent already.

    Returns:
        What was sent.

    Raises:
        ValueError: a checkpoint without adapters, or with adapters that the roster's rule does not go with.
        CheckpointMismatchError: the checkpoint is of another run or party.
        RejectedUpdateError: the update is not fit to be mixed (NaN, say).
        FederationError: the server is ahead, nothing was trained, or another update was sent already.
    """
    roster = mailbox.roster
    saved = PartyCheckpoint.read(checkpoint)
    require_key(mailbox, party, signer)
    place = saved.place(roster, party)
    if saved.config.global_branch != roster.global_branch:
        wanted = roster.global_branch
        raise ValueError(
            f"The roster of run `{roster.run}` says global_branch={wanted}, but the adapters in `{saved.where}` were "
            f"trained with global_branch={not wanted}. Train with `CoLoRA(..., global_branch={wanted})` from the start."
        )
    if mailbox.last_mixture(party, since=place.round, previous=place.previous) is not None:
        raise FederationError(
            f"The server has gone on without `{saved.where}`: it has mixed round {place.round}. Take that in with "
            "`lightning-pfl round apply` first, train, and export then."
        )
    if saved.step <= place.step:
        raise FederationError(
            f"`{saved.where}` has trained nothing since round {place.round - 1} was taken in: it is at step "
            f"{saved.step}. Train on from it, save a checkpoint, and export that one."
        )
    content = ClientUpdate(party, place.round, num_examples, saved.architecture, saved.shared(), saved.sketch())
    UpdateGuard().accept([content])
    update = Update(roster.run, place.previous, content, saved.base)
    send(update, mailbox, signer, overwrite=overwrite)
    return update


def send(update: Update, mailbox: Mailbox, signer: Signer, *, overwrite: bool) -> Sealed:
    """Sign an update and write it, unless this very update is there already.

    Raises:
        FederationError: another one is there.
    """
    party, round = update.content.client_id, update.content.round
    sealed = Sealed.of(update, signer)
    there = mailbox.update(party, round) if not overwrite else None
    if there is not None and there.digest != sealed.digest:
        raise FederationError(
            f"Another update of `{party}` for round {round} lies in {there.path} already. Pass `overwrite` to replace "
            "it, as long as the server has not mixed the round."
        )
    where = mailbox.write(sealed, UPDATE, party, round)
    _LOG.info("The update of `%s` for round %d lies in %s.", party, round, where)
    return sealed


def apply(
    checkpoint: str | os.PathLike[str],
    mailbox: Mailbox,
    party: str,
    *,
    output: str | os.PathLike[str] | None = None,
) -> Mixture | None:
    """Take the newest mixture into a party's checkpoint, for the next ``trainer.fit(ckpt_path=...)``.

    It overwrites the frozen global branch or, where the server's rule says so, what the party starts from. What is the
    party's own stays: its adapter, its gate, its head, optimizers and schedules.

    Args:
        checkpoint: of its Trainer, any fsspec URL.
        mailbox: with the run's roster.
        party: for whom.
        output: where the changed checkpoint goes; None: in place of the old one.

    Returns:
        The mixture; None if there is nothing that the checkpoint does not know.

    Raises:
        ValueError: the mixture does not fit the checkpoint's adapters.
        CheckpointMismatchError: the checkpoint is of another run or party.
        WrongMessageError: a message is out of order, or not what was signed.
    """
    roster = mailbox.roster
    roster.key_of(party)
    saved = PartyCheckpoint.read(checkpoint)
    place = saved.place(roster, party)
    letter = mailbox.last_mixture(party, since=place.round, previous=place.previous)
    if letter is None:
        return None
    mixture = mailbox.read_mixture(letter)
    if mixture.round < place.round:
        raise WrongMessageError(f"The mixture in `{letter.path}` is older than the checkpoint.")
    for note in mixture.notes:
        _LOG.warning("Round %d: %s", mixture.round, note)
    following = replace(place, round=mixture.round + 1, previous=letter.digest, step=saved.step)
    saved.following(following, mixture.content).write(output or checkpoint)
    return mixture


def require_key(mailbox: Mailbox, party: str, signer: Signer) -> None:
    """Check that a key is the one by which the roster knows a party.

    Raises:
        ValueError: it is not, or there is no such party.
    """
    if (expected := mailbox.roster.key_of(party)) != signer.public_key:
        raise ValueError(
            f"The key given is {signer.public_key}, but the roster knows `{party}` by {expected}. The server would "
            "refuse what it signs."
        )
