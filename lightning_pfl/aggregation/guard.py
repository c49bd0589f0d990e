"""What an update must satisfy before it counts: a diverged, broken or lying client must not reach the others.

Start at `UpdateGuard`. `accept` looks at each update by itself and needs nothing else, so every aggregator calls it.
`inspect` also knows what the server expects of each client and what the round's other updates and earlier rounds look
like; the federation calls it before every aggregation. What clients must have in common is said in `mixable`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

from lightning_pfl.aggregation.faults import (
    Expectation,
    fault_in,
    known_shapes,
    sizes_of,
    unexpected_in,
    usual_keys_width,
    usual_sketch_size,
)
from lightning_pfl.aggregation.mixable import check_mixable
from lightning_pfl.errors import RejectedUpdateError
from lightning_pfl.functional.robust import upper_fence
from lightning_pfl.types import ClientUpdate

__all__ = ["Expectation", "Inspection", "UpdateGuard", "check_mixable"]

_KEPT = 64  # values of a measure that are remembered of earlier rounds
_ENOUGH = 5  # others of the round that speak for themselves; fewer are judged together with earlier rounds
_ALL_ALIKE = 20  # from so many others on, leaving a client out of its own judgement changes nothing


@final
@dataclass(frozen=True, eq=False)
class Inspection:
    """What came of looking at a round's updates.

    Attributes:
        accepted: those that count, sorted by client id, with absurd claims of examples cut.
        rejected: why the others do not, by client id.
        notes: which claims were cut.
        measures: sizes of accepted updates so far, by what was measured, for the next round's `UpdateGuard.inspect`:
            plain lists of numbers.
    """

    accepted: Sequence[ClientUpdate]
    rejected: Mapping[str, str]
    notes: Sequence[str]
    measures: Mapping[str, Sequence[float]]


@final
@dataclass(frozen=True, kw_only=True)
class UpdateGuard:
    r"""Lets an update through if it is finite, what was asked for, and of a size that the others' make likely.

    Sizes are judged against the other clients' of the round, and against earlier rounds' where there are fewer than
    five others: above the median times :math:`\exp(k \cdot 1.4826 \cdot \mathrm{MAD})` of logarithms, and above a
    multiple of the median, they are absurd (`upper_fence`). A client with less than two others to compare with (one,
    for its claim of examples) is not judged by size. This stops faults and crude attacks; against clients that lie
    within these bounds there are robust rules (`RobustAggregator`).

    Args:
        strict: a rejected update ends the run with `RejectedUpdateError`, so that its exit code says so. False: the
            run goes on as if that client had not taken part, and the log says who and why.
        max_step: how many times the median step (root mean square of what a client changed, P and Q apart from A and B)
            a client's may be in any case; likewise the norm of its sketch. None: steps are not judged.
        max_claim: how many times the median claim of examples a client's may be in any case. What is above is cut, and
            with three clients or more also what is above all others' claims together, so that nobody owns the mean.
            A claim costs its client nothing, so it is cut rather than refused: many examples are no fault.
            None: claims are taken as they are.
        spreads: k, how many robust standard deviations above the median are fine.

    Raises:
        ValueError: a factor below 1, negative spreads.

    Example:
        >>> import torch
        >>> from lightning_pfl.types import FlatTensors, SharedTensors
        >>> def update(client, value, number):
        ...     shared = SharedTensors(FlatTensors.pack({"P": torch.tensor([value])}))
        ...     return ClientUpdate(client, 0, number, "tiny", shared)
        >>> good = [update(f"ward-{number}", 1.0 + 0.1 * number, 100) for number in range(4)]
        >>> seen = UpdateGuard().inspect([*good, update("broken", float("nan"), 100), update("liar", 1.0, 10**9)])
        >>> seen.rejected
        {'broken': '`P` in `common` must be finite, but hold NaN or infinity'}
        >>> seen.accepted[0].client_id, seen.accepted[0].num_examples  # not more than the four others together
        ('liar', 400)
    """

    strict: bool = False
    max_step: float | None = 10.0
    max_claim: float | None = 10.0
    spreads: float = field(default=6.0)

    def __post_init__(self) -> None:
        for name in ("max_step", "max_claim"):
            factor = getattr(self, name)
            if factor is not None and not factor >= 1:
                raise ValueError(f"`{name}` is a multiple of the median, at least 1, but is {factor}.")
        if not self.spreads >= 0:
            raise ValueError(f"`spreads` counts standard deviations and must not be negative, but is {self.spreads}.")

    def accept(self, updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """Look at every update by itself; an aggregator is handed what counts, so what does not is an error here.

        Args:
            updates: in any order.

        Returns:
            All of them, sorted by client id.

        Raises:
            RejectedUpdateError: an update that cannot be mixed, whether or not the guard is ``strict``.
            ValueError: two updates of one client.
        """
        _require_one_each(updates)
        faults = {update.client_id: fault_in(update) for update in updates}
        _refuse(updates, {client: fault for client, fault in sorted(faults.items()) if fault is not None})
        return sorted(updates, key=_client_id)

    def inspect(
        self,
        updates: Sequence[ClientUpdate],
        *,
        expected: Mapping[str, Expectation] | None = None,
        measures: Mapping[str, Sequence[float]] | None = None,
    ) -> Inspection:
        """Look at a round's updates together, with what is known of their clients.

        Args:
            updates: in any order; the result does not depend on it.
            expected: by client id; a client that is not there may send anything that the others' shapes allow.
            measures: of the rounds before, from `Inspection`; left alone.

        Returns:
            Which updates count.

        Raises:
            RejectedUpdateError: ``strict``, and an update does not count; the message names all of them.
            ValueError: two updates of one client.
        """
        _require_one_each(updates)
        known, before = dict(expected or {}), dict(measures or {})
        rejected: dict[str, str] = {}
        shapes, sketch_size = known_shapes(known.values()), usual_sketch_size(updates, known.values())
        keys_width = usual_keys_width(updates, known.values())
        for update in updates:
            expectation = known.get(update.client_id, Expectation())
            fault = fault_in(update) or unexpected_in(update, expectation, shapes, sketch_size, keys_width)
            if fault is not None:
                rejected[update.client_id] = fault
        candidates = sorted((item for item in updates if item.client_id not in rejected), key=_client_id)
        sizes = {item.client_id: sizes_of(item, known.get(item.client_id, Expectation())) for item in candidates}
        if self.max_step is not None:
            rejected |= self._too_large(sizes, before, self.max_step)
        rejected = {client: rejected[client] for client in sorted(rejected)}
        if self.strict:
            _refuse(updates, rejected)
        accepted = [item for item in candidates if item.client_id not in rejected]
        accepted, notes = self._cut_claims(accepted, known, before.get("examples", ()))
        for item in accepted:
            for name, size in {**sizes[item.client_id], "examples": float(item.num_examples)}.items():
                before[name] = [*before.get(name, ()), size][-_KEPT:]
        return Inspection(accepted, rejected, notes, before)

    def _too_large(
        self, sizes: Mapping[str, Mapping[str, float]], before: Mapping[str, Sequence[float]], factor: float
    ) -> dict[str, str]:
        found: dict[str, str] = {}
        for measure in sorted({name for own in sizes.values() for name in own}):
            mine = {client: own[measure] for client, own in sizes.items() if measure in own}
            # two who differ by far are no measure of a third, so the fence is not wary
            fences = self._fences(mine, before.get(measure, ()), factor, fewest=2, wary=False)
            for client, size in mine.items():
                fence = fences[client]
                if fence is not None and size > fence:
                    found.setdefault(
                        client,
                        f"its {_WHAT[measure]} is {size:.3g}, but judged by the others' at most {fence:.3g} is likely. "
                        f"If that is fine, raise `UpdateGuard(max_step={factor:g})`",
                    )
        return found

    def _cut_claims(
        self, updates: Sequence[ClientUpdate], known: Mapping[str, Expectation], before: Sequence[float]
    ) -> tuple[list[ClientUpdate], list[str]]:
        """Claims of examples that are cut, and a note for each."""
        claims = {item.client_id: float(item.num_examples) for item in updates}
        free = {item.client_id for item in updates if not known.get(item.client_id, Expectation()).counted}
        if self.max_claim is None:
            return list(updates), []
        limits = dict(claims)
        fences = self._fences(claims, before, self.max_claim, fewest=1, wary=True)
        for client in free:
            fence = fences[client]
            limits[client] = claims[client] if fence is None else min(claims[client], fence)
        if len(limits) > 2:
            largest = max(limits, key=lambda client: limits[client])
            if largest in free:
                limits[largest] = min(limits[largest], sum(limits.values()) - limits[largest])
        result, notes = [], []
        for item in updates:
            limit = max(1, int(limits[item.client_id]))
            if limit < item.num_examples:
                notes.append(
                    f"Client `{item.client_id}` claims {item.num_examples} examples and counts with {limit}, judged by "
                    "the others' claims. If it has that many, say so: `Client(..., num_examples=...)`."
                )
                item = replace(item, num_examples=limit)
            result.append(item)
        return result, notes

    def _fences(
        self, sizes: Mapping[str, float], before: Sequence[float], factor: float, *, fewest: int, wary: bool
    ) -> dict[str, float | None]:
        """What each client's size is judged by; equal judgements are made once."""
        made: dict[tuple[float, ...], float | None] = {}
        fences = {}
        for client in sizes:
            others = tuple(sorted(_others(sizes, client, before)))
            if others not in made:
                enough = len(others) >= fewest
                made[others] = upper_fence(others, factor=factor, spreads=self.spreads, wary=wary) if enough else None
            fences[client] = made[others]
        return fences


_WHAT = {
    "common": "step in the tensors for all clients (root mean square)",
    "same_architecture": "step in the tensors of its architecture (root mean square)",
    "sketch": "sketch's norm",
}


def _client_id(update: ClientUpdate) -> str:
    return update.client_id


def _refuse(updates: Sequence[ClientUpdate], rejected: Mapping[str, str]) -> None:
    if not rejected:
        return
    rounds = {update.client_id: update.round for update in updates}
    reasons = "; ".join(f"client `{client}` in round {rounds[client]}: {why}" for client, why in rejected.items())
    raise RejectedUpdateError(
        f"These updates cannot be mixed: {reasons}. Look at these clients' data, learning rate and precision. "
        "`UpdateGuard(strict=False).inspect(updates)`, which a federation calls by itself, goes on without them."
    )


def _require_one_each(updates: Sequence[ClientUpdate]) -> None:
    counts = Counter(update.client_id for update in updates)
    if twice := sorted(client for client, number in counts.items() if number > 1):
        raise ValueError(f"A round takes one update per client, but {twice} sent more than one.")


def _others(sizes: Mapping[str, float], client: str, before: Sequence[float]) -> list[float]:
    """What a client's size is compared with."""
    if len(sizes) > _ALL_ALIKE:
        return list(sizes.values())
    others = [size for other, size in sizes.items() if other != client]
    return others if len(others) >= _ENOUGH else [*others, *before]
