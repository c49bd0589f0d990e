"""`Experts`: one client's model that answers each question with the adapter of whoever trained on such questions.

Every client's adapter P, Q means the same in every aligned model, so a client that holds all of them (some kilobytes
each) has as many experts. Who is asked is told from the question alone: `functional.routing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import lightning as L
import torch
from torch import Tensor

from lightning_pfl.callbacks.federated import Exchange, KeySource
from lightning_pfl.functional.routing import Keys, distances, nearest
from lightning_pfl.types import FlatTensors, Personalized, SharedTensors

__all__ = ["Experts"]


@final
class Experts:
    """One client's model, and all clients' adapters to answer with.

    Only what is meant for everybody is exchanged, P and Q; A and B of conventional layers, gates and heads stay the
    client's own whoever answers. Between questions the module holds the client's own adapter.

    Args:
        module: the client's, in evaluation mode; while a question is answered it is changed in place.
        exchange: writes tensors into it.
        source: reads questions.
        client_id: whose model it is.
        adapters: all clients' tensors for everybody, by id, the client's own among them.
        keys: of their questions, by id; a client without any is never asked by others.
        margin: how many times the distance of the nearest owner the own one may be and still answer.

    Attributes:
        module: see above.
        owners: ids of those who can answer, sorted.

    Raises:
        ValueError: an adapter that does not fit, a margin below 1, or no keys of the client's own.
    """

    def __init__(
        self,
        module: L.LightningModule,
        *,
        exchange: Exchange,
        source: KeySource,
        client_id: str,
        adapters: Mapping[str, FlatTensors],
        keys: Mapping[str, Keys],
        margin: float = 1.5,
    ) -> None:
        if client_id not in keys:
            raise ValueError(
                f"`{client_id}` has not sent any keys of its questions yet, so what is its own to answer cannot be "
                f"told. Train it for a round; keys are there of {sorted(keys)[:20]}."
            )
        self.module = module
        self.owners = tuple(sorted(keys.keys() & adapters.keys()))
        self._exchange, self._source, self._margin, self._client_id = exchange, source, margin, client_id
        self._keys = [keys[owner] for owner in self.owners]
        self._own = exchange.upload(module).common
        self._adapters = {owner: _fitted(adapters[owner], self._own, owner) for owner in self.owners}
        self._adapters[client_id] = self._own
        nearest(torch.ones(1, len(self.owners)), own=0, margin=margin)  # a margin that cannot be is refused now

    @property
    def nbytes(self) -> int:
        """What the client must receive for it: all others' adapters and keys, in bytes."""
        return sum(
            self._adapters[owner].nbytes + keys.nbytes
            for owner, keys in zip(self.owners, self._keys, strict=True)
            if owner != self._client_id
        )

    def read(self, batch: Any) -> Tensor:
        """What a batch's questions look like, float32 ``[n, k]``; the same for all clients."""
        return self._source.read(batch)

    def route(self, questions: Tensor) -> tuple[str, ...]:
        """Who is to answer each question.

        Args:
            questions: from `read`, ``[n, k]``.

        Returns:
            n ids.
        """
        if not len(questions):
            return ()
        own = self.owners.index(self._client_id)
        places = nearest(distances(questions, self._keys), own=own, margin=self._margin)
        return tuple(self.owners[place] for place in places.tolist())

    def answer(
        self,
        batch: Any,
        answer: Callable[[L.LightningModule, Any], Tensor],
        *,
        owners: Sequence[str] | None = None,
    ) -> Tensor:
        """Answer a batch, each question with its owner's adapter.

        Args:
            batch: tensors, or mappings, lists and tuples of them, that all have n rows.
            answer: of the module and a part of the batch, in the batch's form; one row per question. Randomness in it
                is drawn part by part.
            owners: who answers each question, from `route`. None: who the batch itself asks for.

        Returns:
            The answers in the batch's order, ``[n, ...]``.

        Raises:
            ValueError: another number of owners than questions, an owner that is none, or tensors of unequal lengths.
        """
        count = _length(batch)
        owners = self.route(self.read(batch)) if owners is None else owners
        if len(owners) != count or not set(owners) <= set(self.owners):
            raise ValueError(
                f"A batch of {count} questions needs as many owners, each one of {list(self.owners)[:20]}, but has "
                f"{len(owners)}: {sorted(set(owners))[:20]}."
            )
        rows: list[Tensor] = []
        order: list[int] = []
        for owner in dict.fromkeys(owners):
            places = [place for place, one in enumerate(owners) if one == owner]
            with self._answering(owner), torch.no_grad():
                rows.append(answer(self.module, _rows(batch, places)))
            order += places
        return torch.cat(rows)[torch.tensor(order).argsort().to(rows[0].device)]

    @contextmanager
    def _answering(self, owner: str) -> Iterator[None]:
        if owner == self._client_id:
            yield
            return
        self._write(self._adapters[owner])
        try:
            yield
        finally:
            self._write(self._own)

    def _write(self, common: FlatTensors) -> None:
        self._exchange.receive(self.module, Personalized(start=SharedTensors(common)))


def _fitted(adapter: FlatTensors, own: FlatTensors, owner: str) -> FlatTensors:
    """An adapter in the names of a model: what its owner does not have is 0, what has no place in it is left out."""
    there, fitted = adapter.unpack(), {}
    for name, mine in own.unpack().items():
        value = there.get(name, torch.zeros_like(mine))
        if value.shape != mine.shape:
            raise ValueError(
                f"`{name}` must have one shape on all clients, but is {tuple(value.shape)} on `{owner}` and "
                f"{tuple(mine.shape)} here."
            )
        fitted[name] = value
    return FlatTensors.pack(fitted)


def _length(batch: Any) -> int:
    lengths = {len(tensor) for tensor in _tensors(batch)}
    if len(lengths) != 1:
        raise ValueError(
            "A batch must be tensors, or mappings, lists and tuples of tensors, with one row per question, but their "
            f"lengths are {sorted(lengths)}."
        )
    return lengths.pop()


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors(value)
    else:
        raise ValueError(
            f"A batch must hold tensors with one row per question, but holds a {type(batch).__name__}. Leave out what "
            "is not a tensor."
        )


def _rows(batch: Any, places: Sequence[int]) -> Any:
    if isinstance(batch, Tensor):
        return batch[torch.tensor(places, device=batch.device)]
    if isinstance(batch, Mapping):
        return {name: _rows(value, places) for name, value in batch.items()}
    return type(batch)([_rows(value, places) for value in batch])
