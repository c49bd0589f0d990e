"""JSON that came from elsewhere: parsed, checked against a schema, or refused with what is wrong and where.

Start at `Schema`. A document that passes is what its schema says, so readers need no checks of their own. Numbers that
are not finite, names that occur twice and nesting without end are refused before any schema is asked, since parsers
differ in what they make of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, final

import jsonschema

__all__ = ["FIT_FOR_A_PATH", "SHA256", "Schema", "canonical_digest"]

FIT_FOR_A_PATH = r"^(?!.*[.]\Z)[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z"
"""What a name must match that becomes a folder's: no separators, no leading dot, nothing that climbs."""

SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}\\Z"}
"""Schema of a digest."""

_DEEPEST = 64


@final
class Schema:
    """What one kind of document must look like.

    Args:
        kind: what the document is called in messages, for example "A roster".
        schema: a JSON schema, draft 2020-12.

    Example:
        >>> schema = Schema("A greeting", {"type": "object", "required": ["to"]})
        >>> schema.read(b'{"to": "ward-3"}', "hello.json")
        {'to': 'ward-3'}
    """

    def __init__(self, kind: str, schema: Mapping[str, Any]) -> None:
        self.kind = kind
        self.schema = dict(schema)
        jsonschema.Draft202012Validator.check_schema(self.schema)
        self._validator = jsonschema.Draft202012Validator(self.schema)

    def read(self, text: bytes, where: str) -> Any:
        """Parse and check.

        Args:
            text: UTF-8.
            where: the file's name, for messages.

        Raises:
            ValueError: not JSON, or not what the schema says; the message names the place in the document.
        """
        try:
            document = json.loads(text.decode("utf-8"), object_pairs_hook=_once_each, parse_constant=_not_finite)
        except (ValueError, RecursionError) as error:  # a decoding error is a ValueError, too
            raise ValueError(f"{self.kind} must be JSON, but `{where}` is not: {_short(str(error))}.") from None
        if _depth(document) > _DEEPEST:
            raise ValueError(f"{self.kind} is not nested deeper than {_DEEPEST} levels, but `{where}` is.")
        self.check(document, where)
        return document

    def check(self, document: Any, where: str) -> None:
        """Check what was parsed already.

        Raises:
            ValueError: as `read`.
        """
        error = jsonschema.exceptions.best_match(self._validator.iter_errors(document))
        if error is not None:
            place = "".join(f"[{part!r}]" for part in error.absolute_path) or "the whole document"
            raise ValueError(f"{self.kind} is wrong in `{where}` at {place}: {_short(error.message)}.")


def canonical_digest(document: Any) -> str:
    """sha256 of a document as such, whatever its spaces and the order of its names.

    Example:
        >>> canonical_digest({"a": 1, "b": 2}) == canonical_digest({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"a name occurs twice in one object: {sorted({n for n in names if names.count(n) > 1})[:3]}")
    return document


def _not_finite(constant: str) -> Any:
    raise ValueError(f"{constant} is no number in JSON")


def _depth(document: Any) -> int:
    deepest, level = 0, [document]
    while level:
        deepest += 1
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return deepest


def _short(text: str) -> str:
    return (text if len(text) < 300 else f"{text[:300]}...").rstrip(".")
