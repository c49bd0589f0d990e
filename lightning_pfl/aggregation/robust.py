"""`RobustAggregator`: what clients receive depends little on a few that lie, also between models of two architectures.

A robust rule compares clients number by number or vector by vector, so it needs a group that holds the same tensors:
P and Q of all clients that have a role, A and B of one architecture. A group that is too small for the number of
attackers is not mixed at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from lightning_pfl.aggregation.base import Aggregator
from lightning_pfl.aggregation.guard import UpdateGuard
from lightning_pfl.aggregation.memory import Upload, copied, dump, load, remember, require_rule
from lightning_pfl.aggregation.mixable import check_mixable, some
from lightning_pfl.aggregation.robust_rules import CoordinateMedian, RobustRule
from lightning_pfl.functional.averaging import by_holders, write_names
from lightning_pfl.functional.relevance import Peers
from lightning_pfl.functional.robust import clip_rows, coordinate_median
from lightning_pfl.functional.similarity import Cosine
from lightning_pfl.types import Aggregation, ClientUpdate, FlatTensors, Layout, Personalized, SharedTensors

__all__ = ["RobustAggregator"]

_RULE = "robust"


@final
class RobustAggregator(Aggregator):
    """Mixes the last known uploads by a rule that up to `num_attackers` clients cannot bend far.

    The rule is applied to every group of tensors that the same clients hold: P and Q over all architectures, A and B
    within one. A group smaller than the rule needs (2 f + 2; Krum 2 f + 3) could consist of attackers and one honest
    client, so nobody in it receives anything of the others: each keeps its own values, shortened to at most twice the
    median length among all clients, and the notes of the `Aggregation` say so.

    Args:
        rule: how a group is mixed. None: `CoordinateMedian`.
        num_attackers: f, how many clients of all may lie; all of them may be in one group.
        warm_start: whether the mixture also overwrites the client's own adapter L before its next turn.
        global_branch: whether clients hold the frozen global adapter G. False leaves the warm start alone.
        ema: how much of a client's earlier sketch is kept when a new one comes, 0 to below 1.
        max_staleness: an upload that is more rounds old than this is not mixed into the others'. None: no limit.
        guard: what an update must satisfy to count at all.

    Raises:
        ValueError: neither a global branch nor a warm start, or a number out of range.

    Example:
        >>> updates = [
        ...     ClientUpdate(name, 0, 10, "tiny", SharedTensors(FlatTensors.pack({"P": torch.tensor([value])})))
        ...     for name, value in {"a": 1.0, "b": 2.0, "c": 3.0, "liar": -1e6}.items()
        ... ]
        >>> RobustAggregator(num_attackers=1).aggregate(updates, {}).personalized["a"].frozen.common.vector
        tensor([1.5000])
    """

    def __init__(
        self,
        rule: RobustRule | None = None,
        *,
        num_attackers: int = 1,
        warm_start: bool = False,
        global_branch: bool = True,
        ema: float = 0.5,
        max_staleness: int | None = None,
        guard: UpdateGuard | None = None,
    ) -> None:
        if not global_branch and not warm_start:
            raise ValueError(
                "A mixture must go somewhere: with `global_branch=False` set `warm_start=True`, or take `LocalOnly()` "
                "if nothing is to be mixed."
            )
        if num_attackers < 0:
            raise ValueError(f"`num_attackers` counts clients and must not be negative, but is {num_attackers}.")
        if not 0 <= ema < 1:
            raise ValueError(f"`ema` says how much of the earlier sketch is kept, 0 to below 1, but is {ema}.")
        if max_staleness is not None and max_staleness < 0:
            raise ValueError(f"`max_staleness` counts rounds and must not be negative, but is {max_staleness}.")
        self.rule = rule or CoordinateMedian()
        self.num_attackers = num_attackers
        self.warm_start = warm_start
        self.global_branch = global_branch
        self.ema = ema
        self.max_staleness = max_staleness
        self.guard = guard or UpdateGuard()

    @property
    def uses_global_branch(self) -> bool:
        """As the user chose."""
        return self.global_branch

    @property
    def needs_sketches(self) -> bool:
        """Whether the rule reads similarities."""
        return self.rule.needs_sketches

    def aggregate(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any]) -> Aggregation:
        """Mix the last known uploads of all clients, group by group."""
        require_rule(state, _RULE)
        accepted = self.guard.accept(updates)
        uploads = remember(load(state.get("uploads", {})), accepted, ema=self.ema)
        if not uploads:
            raise ValueError("There is nothing to aggregate: no client has sent an update that counts.")
        check_mixable(
            {client: upload.shared for client, upload in uploads.items()},
            {client: upload.architecture for client, upload in uploads.items()},
            {client: upload.sketch for client, upload in uploads.items()},
        )
        now = max([*(update.round for update in updates), state.get("round", 0)])
        peers = self._peers(uploads, now)
        notes: list[str] = []
        common, rows = self._mixed(_flats(uploads, "common"), peers, uploads, notes)
        bound = self._bound(uploads, peers, notes)
        greeting = self._greeting(uploads, peers)
        return Aggregation(
            personalized={
                client: self._personalized(SharedTensors(common[index], bound[client]))
                for index, client in enumerate(uploads)
            },
            newcomer=self._personalized(greeting),
            state={"rule": _RULE, "round": now, "uploads": dump(uploads)},
            client_ids=tuple(uploads),
            weights=None if rows is None else rows.float(),
            similarity=None if peers.similarity is None else peers.similarity.clone(),
            notes=tuple(notes),
        )

    def center(self, updates: Sequence[ClientUpdate]) -> SharedTensors:
        """The coordinate-wise median: one client among several does not decide what stands on the driver."""
        return SharedTensors(
            _median([update.shared.common for update in updates]),
            _median([update.shared.same_architecture for update in updates]),
        )

    def _personalized(self, mixture: SharedTensors) -> Personalized:
        return Personalized(
            frozen=mixture if self.global_branch else None,
            start=SharedTensors(copied(mixture.common), copied(mixture.same_architecture)) if self.warm_start else None,
        )

    def _peers(self, uploads: Mapping[str, Upload], now: int) -> Peers:
        sketches = [upload.sketch for upload in uploads.values()]
        known = [sketch for sketch in sketches if sketch is not None and bool(sketch.any())]
        size = known[0].numel() if known else 0
        return Peers(
            client_ids=tuple(uploads),
            num_examples=tuple(upload.num_examples for upload in uploads.values()),
            sources=tuple(
                self.max_staleness is None or now - upload.round <= self.max_staleness for upload in uploads.values()
            ),
            similarity=Cosine().matrix(torch.stack([torch.zeros(size) if one is None else one for one in sketches]))
            if known
            else None,
            sketched=tuple(sketch is not None and bool(sketch.any()) for sketch in sketches),
        )

    def _bound(self, uploads: Mapping[str, Upload], peers: Peers, notes: list[str]) -> dict[str, FlatTensors]:
        """Per client what it receives of the tensors of its architecture."""
        clients = list(uploads)
        received: dict[str, FlatTensors] = {}
        for architecture in sorted({upload.architecture for upload in uploads.values()}):
            group = [index for index, client in enumerate(clients) if uploads[client].architecture == architecture]
            flats = [uploads[clients[index]].shared.same_architecture for index in group]
            mixed, _ = self._mixed(flats, _among(peers, group), uploads, notes, part="same_architecture")
            received.update(zip((clients[index] for index in group), mixed, strict=True))
        return received

    def _mixed(
        self,
        flats: Sequence[FlatTensors],
        peers: Peers,
        uploads: Mapping[str, Upload],
        notes: list[str],
        part: str = "common",
    ) -> tuple[list[FlatTensors], Tensor | None]:
        """What each client receives, and how all are weighed in what all hold."""
        received = [flat.vector.clone() for flat in flats]
        shown: Tensor | None = None
        needed = self.rule.least(self.num_attackers)
        for holders, names, values in by_holders(flats):
            if not values.shape[1]:
                continue
            group = _among(peers, holders)
            if sum(group.sources) >= needed:
                mixed = self.rule.mix(values, group, self.num_attackers)
                result, rows = mixed.values, mixed.rows
            else:
                limit = 2 * _median_rms(_flats(uploads, part)) * values.shape[1] ** 0.5
                result, rows = clip_rows(values, limit), torch.eye(len(holders), dtype=torch.float64)
                if len(flats) > 1:
                    notes.append(
                        f"{sum(group.sources)} clients ({some(group.client_ids)}) hold {some(names)}, but {needed} are "
                        f"needed where {self.num_attackers} may lie: each keeps its own."
                    )
            for row, holder in enumerate(holders):
                write_names(received[holder], flats[holder].layout, names, result[row])
            if len(holders) == len(flats):
                shown = rows
        return [FlatTensors(flat.layout, vector) for flat, vector in zip(flats, received, strict=True)], shown

    def _greeting(self, uploads: Mapping[str, Upload], peers: Peers) -> SharedTensors:
        """For a client whose model is not known yet: the median of what all clients hold, if they are enough."""
        flats = [flat for flat, source in zip(_flats(uploads, "common"), peers.sources, strict=True) if source]
        if len(flats) < self.rule.least(self.num_attackers):
            return SharedTensors()
        everywhere = set.intersection(*(set(flat.layout.names) for flat in _flats(uploads, "common")))
        median = _median(flats).unpack()
        return SharedTensors(FlatTensors.pack({name: median[name] for name in everywhere}))


def _flats(uploads: Mapping[str, Upload], part: str) -> list[FlatTensors]:
    return [getattr(upload.shared, part) for upload in uploads.values()]


def _among(peers: Peers, group: Sequence[int]) -> Peers:
    """Some of the clients, as if there were no others."""
    if len(group) == len(peers.client_ids):
        return peers
    return replace(
        peers,
        client_ids=tuple(peers.client_ids[index] for index in group),
        num_examples=tuple(peers.num_examples[index] for index in group),
        sources=tuple(peers.sources[index] for index in group),
        similarity=None if peers.similarity is None else peers.similarity[list(group)][:, list(group)],
        sketched=tuple(peers.sketched[index] for index in group),
    )


def _median(flats: Sequence[FlatTensors]) -> FlatTensors:
    """The coordinate-wise median of every tensor, over those that hold it."""
    parts: dict[str, Tensor] = {}
    for holders, names, values in by_holders(flats):
        layout = flats[holders[0]].layout
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        own = Layout(names, tuple(shapes[name] for name in names))
        parts |= FlatTensors(own, coordinate_median(values)).unpack()
    return FlatTensors.pack(parts)


def _median_rms(flats: Sequence[FlatTensors]) -> float:
    """How large a client's numbers usually are."""
    sizes = [float(flat.vector.double().square().mean().sqrt()) for flat in flats if flat.vector.numel()]
    return float(torch.tensor(sizes, dtype=torch.float64).median()) if sizes else 0.0
