"""`Experts`: one client's model that answers each question with the adapters of those who trained on such questions.

Every client's adapter P, Q means the same in every aligned model, so a client that holds all of them (some kilobytes
each) has as many experts, and any mean of them is one more. Who is asked is told from the question alone:
`functional.routing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import lightning as L
import torch
from torch import Tensor

from lightning_pfl.callbacks.federated import Exchange, KeySource
from lightning_pfl.functional.routing import Answering, Keys, distances
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
        answering: whose adapters answer a question.

    Attributes:
        module: see above.
        owners: ids of those who can answer, sorted.

    Raises:
        ValueError: an adapter that does not fit, or no keys of the client's own.
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
        answering: Answering,
    ) -> None:
        if client_id not in keys:
            raise ValueError(
                f"`{client_id}` has not sent any keys of its questions yet, so what is its own to answer cannot be "
                f"told. Train it for a round; keys are there of {sorted(keys)[:20]}."
            )
        self.module = module
        self.owners = tuple(sorted(keys.keys() & adapters.keys()))
        self._exchange, self._source, self._answering, self._client_id = exchange, source, answering, client_id
        self._keys = [keys[owner] for owner in self.owners]
        self._own = exchange.upload(module).common
        self._adapters = {owner: _fitted(adapters[owner], self._own, owner) for owner in self.owners}
        self._adapters[client_id] = self._own
        self._alone = torch.zeros(len(self.owners))
        self._alone[self.owners.index(client_id)] = 1

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

    def weigh(self, questions: Tensor) -> Tensor:
        """How much each owner's adapter counts in the one that answers a question.

        Args:
            questions: from `read`, ``[n, k]``.

        Returns:
            float32 ``[n, N]`` in the order of `owners`; rows sum to 1.
        """
        if not len(questions):
            return torch.zeros(0, len(self.owners))
        own = self.owners.index(self._client_id)
        return self._answering.weights(distances(questions, self._keys), own=own)

    def answer(
        self,
        batch: Any,
        answer: Callable[[L.LightningModule, Any], Tensor],
        *,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Answer a batch, each question with a mean of its owners' adapters.

        Questions with the same mean are answered together, so a batch costs as many passes as it has different ones.

        Args:
            batch: tensors, or mappings, lists and tuples of them, that all have n rows.
            answer: of the module and a part of the batch, in the batch's form; one row per question. Randomness in it
                is drawn part by part.
            weights: what each owner's adapter counts for each question, from `weigh`. None: as the batch itself asks.

        Returns:
            The answers in the batch's order, ``[n, ...]``.

        Raises:
            ValueError: weights of another number of questions or owners, or tensors of unequal lengths.
        """
        count = _length(batch)
        weights = self.weigh(self.read(batch)) if weights is None else weights.float().cpu()
        if weights.shape != (count, len(self.owners)) or not bool(torch.isfinite(weights).all()):
            raise ValueError(
                f"A batch of {count} questions needs finite weights of {len(self.owners)} owners for each, but has "
                f"{'some that are not finite' if weights.isfinite().logical_not().any() else tuple(weights.shape)}."
            )
        mixtures, of = weights.unique(dim=0, return_inverse=True)
        rows: list[Tensor] = []
        order: list[Tensor] = []
        for number, mixture in enumerate(mixtures):
            places = (of == number).nonzero()[:, 0]
            with self._answering_with(mixture), torch.no_grad():
                rows.append(answer(self.module, _rows(batch, places)))
            order.append(places)
        return torch.cat(rows)[torch.cat(order).argsort().to(rows[0].device)]

    @contextmanager
    def _answering_with(self, mixture: Tensor) -> Iterator[None]:
        if torch.equal(mixture, self._alone):
            yield
            return
        self._write(self._mean(mixture))
        try:
            yield
        finally:
            self._write(self._own)

    def _mean(self, mixture: Tensor) -> FlatTensors:
        """In the order of owners, so that the same weights give the same bits; one owner's adapter as it is."""
        counted = {owner: weight for owner, weight in zip(self.owners, mixture, strict=True) if weight}
        if list(counted.values()) == [1]:
            return self._adapters[next(iter(counted))]
        tensors = [(weight, self._adapters[owner].unpack()) for owner, weight in counted.items()]
        return FlatTensors.pack(
            {
                name: torch.stack([weight * there[name].float() for weight, there in tensors]).sum(dim=0).to(own.dtype)
                for name, own in self._own.unpack().items()
            }
        )

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


def _rows(batch: Any, places: Tensor) -> Any:
    if isinstance(batch, Tensor):
        return batch[places.to(batch.device)]
    if isinstance(batch, Mapping):
        return {name: _rows(value, places) for name, value in batch.items()}
    return type(batch)([_rows(value, places) for value in batch])
