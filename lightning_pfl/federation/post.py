"""`Post`: the server's side of what is written in the run's wire format, and `write_update`, the client's.

Both sides keep to one rule: what one of them may leave out of a letter is what the other has *counted*, an update that
was accepted together with the client's new private state. So a turn that is run again, or whose round is given up,
writes the same letter again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

import torch

from lightning_pfl.aggregation.memory import dump_flat, load_flat
from lightning_pfl.errors import CheckpointMismatchError
from lightning_pfl.federation.letters import (
    Terms,
    layouts_of,
    read_keys,
    read_personalized,
    read_shared,
    read_sketch,
    write_keys,
    write_personalized,
    write_shared,
    write_sketch,
)
from lightning_pfl.federation.privacy import overlaid
from lightning_pfl.functional.wire import LargestChanges, WireFormat
from lightning_pfl.types import (
    Assignment,
    ClientUpdate,
    FlatTensors,
    Layout,
    Letter,
    Personalized,
    PersonalizedLetter,
    SharedTensors,
    UpdateLetter,
)

__all__ = ["Post", "dump_letter", "load_letter", "write_update"]


def write_update(
    update: ClientUpdate, terms: Terms, *, copy: SharedTensors | None, owed: SharedTensors | None
) -> tuple[UpdateLetter, ClientUpdate, SharedTensors | None]:
    """Write what a client sends.

    Args:
        update: what it has to send.
        terms: of the turn.
        copy: what the server has of its tensors, where changes are told; None: nothing.
        owed: what was held back before and is not in `update` already: added to it.

    Returns:
        The letter; the update as the server will read it; and what is held back now, None where everything is sent.
    """
    shared, changes = update.shared, isinstance(terms.wire, LargestChanges)
    if not changes or not terms.has_copy or copy is None or layouts_of(copy) != layouts_of(shared):
        copy = None
    if copy is not None and owed is not None:
        shared = _combined(shared, owed, 1.0)
    letter = write_shared(shared, terms.wire, known=terms.known, copy=copy)
    read = read_shared(letter, terms.wire, layouts=layouts_of(shared), copy=copy)
    sketch = None if update.sketch is None else write_sketch(update.sketch, terms.wire)
    keys = None if update.keys is None else write_keys(update.keys)
    received = replace(update, shared=read, sketch=None if sketch is None else read_sketch(sketch, terms.wire))
    return UpdateLetter(letter, sketch, keys), received, _combined(shared, read, -1.0) if changes else None


@final
class Post:
    """What the server knows of its correspondence with each client.

    Args:
        wire: the run's format; None: nothing is written, tensors travel as they are.
    """

    def __init__(self, wire: WireFormat | None) -> None:
        self.wire = wire
        self._layouts: dict[str, dict[bytes, Layout]] = {}  # that clients have sent
        self._copies: dict[str, SharedTensors] = {}  # of what they have sent, where changes are told

    def terms(self, client_id: str) -> Terms | None:
        """On which terms a client's turn writes; None: nothing is written."""
        if self.wire is None:
            return None
        return Terms(self.wire, frozenset(self._layouts.get(client_id, ())), client_id in self._copies)

    def sealed(self, client_id: str | None, personalized: Personalized) -> Personalized | PersonalizedLetter:
        """What a client receives, as it travels; ``client_id`` is None for whoever knows nothing yet."""
        if self.wire is None:
            return personalized
        return write_personalized(personalized, self.wire, known=self._layouts.get(client_id or "", ()))

    def all_sealed(self, personalized: Mapping[str, Personalized]) -> dict[str, Personalized | PersonalizedLetter]:
        """What each client receives, as it travels; what is one object for several clients is written once."""
        written: dict[tuple[int, frozenset[bytes]], Personalized | PersonalizedLetter] = {}
        sealed = {}
        for client_id, sent in personalized.items():
            key = id(sent), frozenset(self._layouts.get(client_id, ()))
            if key not in written:
                written[key] = self.sealed(client_id, sent)
            sealed[client_id] = written[key]
        return sealed

    def opened(self, client_id: str, personalized: Personalized | PersonalizedLetter) -> Personalized:
        """What a client has received, as it reads it."""
        if not isinstance(personalized, PersonalizedLetter):
            return personalized
        assert self.wire is not None
        return read_personalized(personalized, self.wire, layouts=self._layouts.get(client_id, {}))

    def read(self, letter: UpdateLetter | None, update: ClientUpdate, assignment: Assignment) -> ClientUpdate:
        """What a client has sent.

        Args:
            letter: of the client.
            update: all else that came with it.
            assignment: what the client was asked.

        Raises:
            ValueError: the letter cannot be read.
        """
        assert self.wire is not None
        if letter is None:
            raise ValueError(f"Tensors must come written as {self.wire!r}, but there is no letter.")
        copy = self._copies.get(update.client_id)
        if copy is not None:
            copy = overlaid(copy, self.opened(update.client_id, assignment.personalized).start)
        layouts = self._layouts.get(update.client_id, {})
        shared = read_shared(letter.shared, self.wire, layouts=layouts, copy=copy)
        sketch = None if letter.sketch is None else read_sketch(letter.sketch, self.wire)
        keys = None if letter.keys is None else read_keys(letter.keys)
        return replace(update, shared=shared, sketch=sketch, keys=keys)

    def count(self, client_id: str, shared: SharedTensors) -> None:
        """Remember an update that counts, and whose client keeps its new state."""
        if self.wire is None:
            return
        self._layouts[client_id] = layouts_of(shared)
        if isinstance(self.wire, LargestChanges):
            self._copies[client_id] = shared

    def state_dict(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint."""
        if self.wire is None:
            return {}
        return {
            "wire": repr(self.wire),
            "layouts": {
                client_id: [[list(one.names), [list(shape) for shape in one.shapes]] for one in layouts.values()]
                for client_id, layouts in self._layouts.items()
            },
            "copies": {
                client_id: [dump_flat(copy.common), dump_flat(copy.same_architecture)]
                for client_id, copy in self._copies.items()
            },
        }

    def check(self, saved: Mapping[str, Any]) -> None:
        """Check that a correspondence can go on.

        Raises:
            CheckpointMismatchError: it was written in another format.
        """
        before, now = saved.get("wire", "None"), repr(self.wire)
        if before != now:
            raise CheckpointMismatchError(
                f"In the checkpoint's run clients and server wrote to each other in the format {before}, and in this "
                f"one in {now}, so they could not read what is in it. Resume with `FederatedStrategy(wire={before})`."
            )

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Undo `state_dict`."""
        self._layouts = {
            client_id: layouts_of(SharedTensors(*(_blank(*entry) for entry in entries)))
            for client_id, entries in saved.get("layouts", {}).items()
        }
        self._copies = {
            client_id: SharedTensors(*(load_flat(entry) for entry in entries))
            for client_id, entries in saved.get("copies", {}).items()
        }


def dump_letter(letter: PersonalizedLetter) -> dict[str, Any]:
    """A letter as plain containers of tensors of bytes."""
    return {
        "letters": [
            None if one is None else [_as_tensor(one.common), _as_tensor(one.same_architecture)]
            for one in (letter.frozen, None if letter.start is letter.frozen else letter.start)
        ],
        "alike": letter.start is letter.frozen,
    }


def load_letter(entry: Mapping[str, Any]) -> PersonalizedLetter:
    """Undo `dump_letter`."""
    frozen, start = (
        None if one is None else Letter(*(piece.numpy().tobytes() for piece in one)) for one in entry["letters"]
    )
    return PersonalizedLetter(frozen, frozen if entry["alike"] else start)


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def _blank(names: list[str], shapes: list[list[int]]) -> FlatTensors:
    layout = Layout(tuple(names), tuple(tuple(shape) for shape in shapes))
    return FlatTensors(layout, torch.zeros(layout.numel))


def _combined(one: SharedTensors, other: SharedTensors, sign: float) -> SharedTensors:
    pairs = ((one.common, other.common), (one.same_architecture, other.same_architecture))
    return SharedTensors(*(FlatTensors(a.layout, a.vector + sign * b.vector) for a, b in pairs))
