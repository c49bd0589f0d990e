"""Parties that do not share a cluster: rounds by signed files, so that nobody needs an open port.

Start at `export`, `Server.round` and `apply`, which are one round, or at `RemoteServer`, with which a party trains all
rounds in one ``trainer.fit``. What files mean is said in `messages`, where they lie in `mailbox`, who may write them in
`roster`. Nothing here needs Ray, and the server needs no Trainer.
"""

from lightning_pfl.parties.checkpoint import PartyCheckpoint
from lightning_pfl.parties.mailbox import Mailbox, WrongMessageError
from lightning_pfl.parties.messages import Base, Mixture, Update
from lightning_pfl.parties.party import apply, export
from lightning_pfl.parties.remote import RemoteServer
from lightning_pfl.parties.roster import Roster
from lightning_pfl.parties.server import RoundOutcome, Server
from lightning_pfl.parties.signatures import Signer, WrongSignatureError, make_key

__all__ = [
    "Base",
    "Mailbox",
    "Mixture",
    "PartyCheckpoint",
    "RemoteServer",
    "Roster",
    "RoundOutcome",
    "Server",
    "Signer",
    "Update",
    "WrongMessageError",
    "WrongSignatureError",
    "apply",
    "export",
    "make_key",
]
