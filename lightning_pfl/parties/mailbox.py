"""`Mailbox`: where messages lie, in any file system that fsspec knows. One folder per party, which only that party and
the server need to reach.

    <url>/<party>/round-00000/update/{tensors.safetensors, manifest.sig, manifest.json}     written by the party
    <url>/<party>/round-00000/mixture/{...}                                                 written by the server

A message is there when its manifest is, which is written last. Whoever can write to the folder can withhold messages,
but not change or exchange them: every manifest is signed, names its run, party and round, the digest of its tensors,
and the digest of the manifest that it follows.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import fsspec

from lightning_pfl.errors import FederationError
from lightning_pfl.parties.messages import MIXTURE, SCHEMAS, UPDATE, Mixture, Update, as_text
from lightning_pfl.parties.roster import Roster
from lightning_pfl.parties.signatures import Signer, verify

__all__ = ["Letter", "Mailbox", "Sealed", "WrongMessageError"]

_LARGEST_MANIFEST = 4 * 2**20


class WrongMessageError(FederationError):
    """A message that is signed, but does not belong here: of another run, party or round, or out of order."""


@dataclass(frozen=True)
class Sealed:
    """A message ready to be written.

    Attributes:
        manifest: its text.
        signature: of the text.
        tensors: what the manifest's digest is of.
    """

    manifest: bytes
    signature: bytes
    tensors: bytes

    @property
    def digest(self) -> str:
        """What the next message refers to."""
        return hashlib.sha256(self.manifest).hexdigest()

    @staticmethod
    def of(message: Update | Mixture, signer: Signer) -> Sealed:
        """Sign a message."""
        manifest, tensors = message.to_files()
        text = as_text({**manifest, "tensors": {"sha256": hashlib.sha256(tensors).hexdigest(), "nbytes": len(tensors)}})
        return Sealed(text, signer.sign(text), tensors)


@dataclass(frozen=True, eq=False)
class Letter:
    """A manifest whose signature was checked.

    Attributes:
        manifest: as its schema says.
        digest: of its text.
        path: of its folder in the file system.
    """

    manifest: Mapping[str, Any]
    digest: str
    path: str


@final
class Mailbox:
    """Reads and writes messages.

    Args:
        url: a folder, or any URL that fsspec knows.
        roster: whose keys count.
        max_nbytes: tensors of a message that are larger are refused before they are read.

    Example:
        >>> roster = Roster("wards-1", f"ed25519:{'0' * 64}", {"ward-3": f"ed25519:{'1' * 64}"})
        >>> Mailbox("memory://exchange", roster).mixture("ward-3", 0) is None  # nothing has come yet
        True
    """

    def __init__(self, url: str | os.PathLike[str], roster: Roster, *, max_nbytes: int = 2**31) -> None:
        self.roster = roster
        self._max_nbytes = max_nbytes
        self._files, root = fsspec.core.url_to_fs(os.fspath(url))
        self._root = root.rstrip("/")

    def update(self, party: str, round: int) -> Letter | None:
        """A party's update of a round, signed by it; None if it has not come.

        Raises:
            FederationError, ValueError: it is not signed by the party, or no manifest of such a message.
        """
        return self._letter(UPDATE, party, round, self.roster.key_of(party), party)

    def mixture(self, party: str, round: int) -> Letter | None:
        """The server's mixture for a party, signed by it; None if it has not come.

        Raises:
            FederationError, ValueError: as `update`.
        """
        self.roster.key_of(party)
        return self._letter(MIXTURE, party, round, self.roster.server, "the server")

    def last_mixture(self, party: str, *, since: int, previous: str) -> Letter | None:
        """The newest mixture that follows, message by message, the last one that a party knows.

        Args:
            party: for whom.
            since: the first round that the party does not know.
            previous: digest of the last manifest that it knows.

        Returns:
            None if there is nothing newer.

        Raises:
            WrongMessageError: a message does not follow the one before it.
            FederationError, ValueError: as `update`.
        """
        found = None
        if previous == self.roster.digest:  # a party that joins finds its first one wherever the run is by then
            since = min((round for round in self._rounds(party) if round >= since), default=since)
        while (letter := self.mixture(party, since)) is not None:
            _require_follows(letter, previous, "the server's message before it, or this roster")
            found, previous, since = letter, letter.digest, since + 1
        return found

    def read_update(self, letter: Letter) -> Update:
        """The whole message.

        Raises:
            WrongMessageError: its tensors are not the ones that were signed.
            ValueError: they are not what an update holds.
        """
        return Update.of(letter.manifest, self._tensors(letter), f"{letter.path}/tensors.safetensors")

    def read_mixture(self, letter: Letter) -> Mixture:
        """The whole message.

        Raises:
            WrongMessageError, ValueError: as `read_update`.
        """
        return Mixture.of(letter.manifest, self._tensors(letter), f"{letter.path}/tensors.safetensors")

    def write(self, sealed: Sealed, kind: str, party: str, round: int) -> str:
        """Put a message where its reader looks for it, the manifest last; return its folder."""
        folder = self._folder(kind, party, round)
        self._files.makedirs(folder, exist_ok=True)
        for name, content in (
            ("tensors.safetensors", sealed.tensors),
            ("manifest.sig", sealed.signature),
            ("manifest.json", sealed.manifest),
        ):
            write_whole(self._files, f"{folder}/{name}", content)
        return folder

    def _rounds(self, party: str) -> list[int]:
        """For which rounds there is a mixture."""
        try:
            paths = self._files.glob(f"{self._root}/{party}/round-*/{MIXTURE}/manifest.json")
        except FileNotFoundError:
            return []
        names = [path.split("/")[-3].removeprefix("round-") for path in paths]
        return [int(name) for name in names if name.isdigit() and len(name) < 12]

    def _folder(self, kind: str, party: str, round: int) -> str:
        return f"{self._root}/{party}/round-{round:05d}/{kind}"

    def _letter(self, kind: str, party: str, round: int, key: str, who: str) -> Letter | None:
        folder = self._folder(kind, party, round)
        where = f"{folder}/manifest.json"
        try:
            if self._files.size(where) > _LARGEST_MANIFEST:
                raise ValueError(f"`{where}` is larger than any manifest, {_LARGEST_MANIFEST} bytes.")
            text: bytes = self._files.cat_file(where)
        except FileNotFoundError:
            return None
        try:
            signature: bytes = self._files.cat_file(f"{folder}/manifest.sig")
        except FileNotFoundError:
            raise WrongMessageError(f"`{where}` has no signature beside it, so nobody can tell who wrote it.") from None
        verify(text, signature, key, where, who)
        manifest = SCHEMAS[kind].read(text, where)
        for name, expected in (("run", self.roster.run), ("party", party), ("round", round)):
            if manifest[name] != expected:
                raise WrongMessageError(
                    f"`{where}` must be of {name} `{expected}`, but says `{manifest[name]}`: it was signed for another "
                    "place and put here. Ask who can write to this folder."
                )
        return Letter(manifest, hashlib.sha256(text).hexdigest(), folder)

    def _tensors(self, letter: Letter) -> bytes:
        where, about = f"{letter.path}/tensors.safetensors", letter.manifest["tensors"]
        if about["nbytes"] > self._max_nbytes:
            raise WrongMessageError(
                f"`{where}` holds {about['nbytes']} bytes, but {self._max_nbytes} are the most that is read here. "
                "If that is fine, raise `max_nbytes`."
            )
        try:
            found = self._files.size(where)
            content: bytes = self._files.cat_file(where) if found == about["nbytes"] else b""
        except FileNotFoundError:
            raise WrongMessageError(f"`{where}` is not there, although its manifest is.") from None
        if found != about["nbytes"] or hashlib.sha256(content).hexdigest() != about["sha256"]:
            raise WrongMessageError(
                f"`{where}` must be the {about['nbytes']} bytes that its manifest names by their sha256, but is not: "
                "it was damaged or exchanged. Fetch it again."
            )
        return content


def write_whole(files: Any, path: str, content: bytes) -> None:
    """Write a file so that a reader sees all of it or nothing."""
    protocol = files.protocol
    if "file" not in ((protocol,) if isinstance(protocol, str) else protocol):
        files.pipe_file(path, content)  # object stores show an object when it is whole
        return
    unfinished = Path(f"{path}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        with open(unfinished, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _require_follows(letter: Letter, previous: str, what: str) -> None:
    if letter.manifest["previous"] != previous:
        raise WrongMessageError(
            f"The message in `{letter.path}` follows the manifest {letter.manifest['previous'][:12]}..., but must "
            f"follow {previous[:12]}... ({what}). Has somebody another roster, or was a run's folder used twice?"
        )
