"""`Roster`: who takes part in a run of parties, with the keys by which they are known. One JSON file, the same for all.

It is handed over once by a way that the parties trust (in person, in a contract), since all later trust comes from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import fsspec

from lightning_pfl.documents import FIT_FOR_A_PATH, Schema, canonical_digest
from lightning_pfl.parties.signatures import PUBLIC_KEY

__all__ = ["Roster"]

_KEY = {"type": "string", "pattern": PUBLIC_KEY}
_ID = {"type": "string", "pattern": FIT_FOR_A_PATH}
_SCHEMA = Schema(
    "A roster",
    {
        "type": "object",
        "required": ["format", "run", "server", "parties", "global_branch"],
        "additionalProperties": False,
        "properties": {
            "format": {"const": 1},
            "run": _ID,
            "server": _KEY,
            "parties": {
                "type": "object",
                "minProperties": 1,
                "propertyNames": _ID,
                "additionalProperties": _KEY,
            },
            "global_branch": {"type": "boolean"},
        },
    },
)


@final
@dataclass(frozen=True)
class Roster:
    """Who takes part.

    Attributes:
        run: name of the run; what is signed for one run counts in no other, so never use one twice.
        server: public key of who mixes.
        parties: public keys by party. Fit for folders' names, and no two equal but for case.
        global_branch: whether the server sends a frozen global adapter, so that every party trains with one.

    Raises:
        ValueError: a name that is not fit for a folder, a key that is none, no party.

    Example:
        >>> roster = Roster("wards-1", f"ed25519:{'0' * 64}", {"ward-3": f"ed25519:{'1' * 64}"})
        >>> len(roster.digest)
        64
    """

    run: str
    server: str
    parties: Mapping[str, str]
    global_branch: bool = True

    def __post_init__(self) -> None:
        _SCHEMA.check(self._document(), "the roster")
        folded: dict[str, str] = {}
        for party in self.parties:
            if (other := folded.setdefault(party.lower(), party)) != party:
                raise ValueError(
                    f"Two parties are called `{other}` and `{party}`, which some file systems do not tell."
                )

    @property
    def digest(self) -> str:
        """What the first message of every party refers to, so that all must have the same roster."""
        return canonical_digest(self._document())

    def key_of(self, party: str) -> str:
        """A party's public key.

        Raises:
            ValueError: no such party.
        """
        if party not in self.parties:
            raise ValueError(f"The roster of run `{self.run}` knows no party `{party}`. It has {sorted(self.parties)}.")
        return self.parties[party]

    def write(self, url: str) -> None:
        """Write the file; any fsspec URL."""
        with fsspec.open(url, "wb") as file:
            file.write(json.dumps(self._document(), indent=2).encode() + b"\n")

    @staticmethod
    def read(url: str) -> Roster:
        """Read the file; any fsspec URL.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no roster; the message says what is wrong where.
        """
        with fsspec.open(url, "rb") as file:
            document = _SCHEMA.read(file.read(), url)
        del document["format"]
        return Roster(**document)

    def _document(self) -> dict[str, Any]:
        return {
            "format": 1,
            "run": self.run,
            "server": self.server,
            "parties": dict(self.parties),
            "global_branch": self.global_branch,
        }
