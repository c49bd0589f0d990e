"""`MixtureAggregator`: every client gets its own mixture of what the clients have last sent.

The general rule; `RelevanceAggregator` and `UniformAggregator` are this one with their weight policy. A mixture goes
into the frozen global adapter G, into the client's own adapter L as a warm start, or into both. P and Q are mixed over
all clients, A and B over those of one architecture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from lightning_pfl.aggregation.base import Welcome, WelcomingAggregator
from lightning_pfl.aggregation.conventional import ConventionalMean, FactorMean
from lightning_pfl.aggregation.guard import UpdateGuard, check_mixable
from lightning_pfl.aggregation.memory import Upload, dump, load, remember, require_rule
from lightning_pfl.functional.averaging import mix, select, weighted_mean
from lightning_pfl.functional.relevance import Peers, WeightPolicy
from lightning_pfl.functional.similarity import Cosine, Similarity
from lightning_pfl.types import Aggregation, ClientUpdate, FlatTensors, Personalized, SharedTensors

__all__ = ["MixtureAggregator"]

_RULE = "mixture"


@final
class MixtureAggregator(WelcomingAggregator):
    """Mixes the last known uploads, one row of weights per client, whether or not it took part in the round.

    Args:
        weights: the policy of the mixture that goes into the frozen global adapter G.
        warm_start: the policy of the mixture that overwrites the client's own adapter L before its next turn; usually
            one that includes the client itself, such as ``Uniform(include_self=True)``. None: L is never touched.
        global_branch: whether clients hold G. False leaves the warm start alone.
        similarity: what the cosines are that the policies read. None: `Cosine()`.
        conventional: how A and B are averaged within an architecture. None: `FactorMean()`.
        ema: how much of a client's earlier sketch is kept when a new one comes, 0 to below 1.
        max_staleness: an upload that is more rounds old than this is not mixed into the others'. None: no limit,
            since under this rule a client's own adapter does not change while it waits.
        guard: what an update must satisfy to count.

    Raises:
        ValueError: neither a global branch nor a warm start, an ``ema`` out of range, a negative ``max_staleness``.

    Example:
        >>> from lightning_pfl.functional.relevance import Uniform
        >>> aggregator = MixtureAggregator(Uniform())
        >>> updates = [
        ...     ClientUpdate(name, 0, 10, "tiny", SharedTensors(FlatTensors.pack({"P": torch.tensor([value])})))
        ...     for name, value in {"ward-3": 1.0, "ward-7": 3.0}.items()
        ... ]
        >>> aggregator.aggregate(updates, {}).personalized["ward-3"].frozen.common.vector
        tensor([3.])
    """

    def __init__(
        self,
        weights: WeightPolicy,
        *,
        warm_start: WeightPolicy | None = None,
        global_branch: bool = True,
        similarity: Similarity | None = None,
        conventional: ConventionalMean | None = None,
        ema: float = 0.5,
        max_staleness: int | None = None,
        guard: UpdateGuard | None = None,
    ) -> None:
        if not global_branch and warm_start is None:
            raise ValueError(
                "A mixture must go somewhere: with `global_branch=False` name a `warm_start=`, for example "
                "`Uniform(include_self=True)`, or take `LocalOnly()` if nothing is to be mixed."
            )
        if not (isinstance(ema, (int, float)) and 0 <= ema < 1):
            raise ValueError(f"`ema` says how much of the earlier sketch is kept, 0 to below 1, but is {ema}.")
        if max_staleness is not None and max_staleness < 0:
            raise ValueError(f"`max_staleness` counts rounds and must not be negative, but is {max_staleness}.")
        self.weights = weights
        self.warm_start = warm_start
        self.global_branch = global_branch
        self.similarity = similarity or Cosine()
        self.conventional = conventional or FactorMean()
        self.ema = ema
        self.max_staleness = max_staleness
        self.guard = guard or UpdateGuard()

    @property
    def uses_global_branch(self) -> bool:
        """As the user chose."""
        return self.global_branch

    @property
    def needs_sketches(self) -> bool:
        """Whether a policy that is used reads similarities."""
        return any(policy.needs_sketches for policy in self._policies())

    def aggregate(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any]) -> Aggregation:
        """Mix the last known uploads of all clients."""
        require_rule(state, _RULE)
        accepted = self.guard.accept(updates)
        uploads = remember(load(state.get("uploads", {})), accepted, ema=self.ema)
        if not uploads:
            raise ValueError("There is nothing to aggregate: no client has sent an update that counts.")
        _check(uploads)
        now = max([*(update.round + update.staleness for update in updates), state.get("round", 0)])
        peers = self._peers(uploads, now)
        rows = self.weights.rows(peers)
        frozen, losses = self._mixtures(uploads, rows) if self.global_branch else ({}, [])
        start, more = self._mixtures(uploads, self.warm_start.rows(peers)) if self.warm_start is not None else ({}, [])
        greeting = _greeting(uploads, peers)
        shown = rows if self.global_branch or self.warm_start is None else self.warm_start.rows(peers)
        return Aggregation(
            personalized={client: Personalized(frozen.get(client), start.get(client)) for client in uploads},
            newcomer=Personalized(
                greeting if self.global_branch else None, greeting if self.warm_start is not None else None
            ),
            state={"rule": _RULE, "round": now, "uploads": dump(uploads)},
            client_ids=tuple(uploads),
            weights=shown.float(),
            similarity=None if peers.similarity is None else peers.similarity.clone(),
            notes=(*self._remarks(uploads, peers), *dict.fromkeys([*losses, *more])),
        )

    def welcome(self, newcomer: ClientUpdate, state: Mapping[str, Any]) -> Welcome:
        """Mix the last known uploads as for a client of its own, which is in no row."""
        require_rule(state, _RULE)
        known = load(state.get("uploads", {}))
        name = newcomer.client_id
        if not known or name in known:
            why = f"`{name}` is one of them" if known else "none has sent anything yet"
            raise ValueError(f"A newcomer starts from what the clients have sent, but {why}.")
        accepted = self.guard.accept([newcomer])
        uploads = remember(known, accepted, ema=self.ema)
        _check(uploads)
        peers = self._peers(uploads, state["round"], newcomers=frozenset({name}))
        shown = (self.weights if self.global_branch or self.warm_start is None else self.warm_start).rows(peers)
        row = dict(zip(uploads, shown[list(uploads).index(name)].tolist(), strict=True))
        if row.pop(name):
            raise ValueError(
                f"Nobody's upload can be mixed for the newcomer `{name}`: "
                f"{' '.join(self._remarks(uploads, peers)) or 'the weights give it nobody.'}"
            )
        frozen = self._mixtures(uploads, self.weights.rows(peers))[0][name] if self.global_branch else None
        start = self._mixtures(uploads, self.warm_start.rows(peers))[0][name] if self.warm_start is not None else None
        return Welcome(
            personalized=Personalized(frozen, start),
            weights={client: weight for client, weight in row.items() if weight},
            notes=tuple(self._remarks(uploads, peers)),
        )

    def _policies(self) -> list[WeightPolicy]:
        return ([self.weights] if self.global_branch else []) + ([self.warm_start] if self.warm_start else [])

    def _peers(self, uploads: Mapping[str, Upload], now: int, newcomers: frozenset[str] = frozenset()) -> Peers:
        sketched = [upload.sketch is not None and bool(upload.sketch.any()) for upload in uploads.values()]
        return Peers(
            client_ids=tuple(uploads),
            num_examples=tuple(upload.num_examples for upload in uploads.values()),
            sources=tuple(
                self.max_staleness is None or now - upload.round <= self.max_staleness for upload in uploads.values()
            ),
            similarity=self._similarity(uploads) if any(sketched) else None,
            sketched=tuple(sketched),
            newcomers=newcomers,
            ages=tuple(max(0, now - upload.round) for upload in uploads.values()),
        )

    def _similarity(self, uploads: Mapping[str, Upload]) -> Tensor:
        """A client without a sketch is like nobody."""
        sketches = [upload.sketch for upload in uploads.values()]
        size = next(sketch.numel() for sketch in sketches if sketch is not None)
        return self.similarity.matrix(
            torch.stack([torch.zeros(size) if sketch is None else sketch for sketch in sketches])
        )

    def _mixtures(self, uploads: Mapping[str, Upload], rows: Tensor) -> tuple[dict[str, SharedTensors], list[str]]:
        """Per client its mixture, common tensors of all clients and others of its architecture's; and what to note."""
        clients = list(uploads)
        common = mix([upload.shared.common for upload in uploads.values()], rows)
        bound: dict[str, FlatTensors] = {}
        notes: list[str] = []
        for architecture in sorted({upload.architecture for upload in uploads.values()}):
            group = [index for index, client in enumerate(clients) if uploads[client].architecture == architecture]
            flats = [uploads[clients[index]].shared.same_architecture for index in group]
            averaged = self.conventional.rows(flats, rows[group][:, group])
            bound.update(zip((clients[index] for index in group), averaged.flats, strict=True))
            notes += averaged.notes
        return {client: SharedTensors(flat, bound[client]) for client, flat in zip(clients, common, strict=True)}, notes

    def _remarks(self, uploads: Mapping[str, Upload], peers: Peers) -> list[str]:
        remarks = []
        if self.needs_sketches and not all(peers.sketched):
            silent = [client for client, sketched in zip(uploads, peers.sketched, strict=True) if not sketched]
            remarks.append(f"No sketch yet from {silent}: their rows are uniform.")
        if not all(peers.sources):
            old = [client for client, source in zip(uploads, peers.sources, strict=True) if not source]
            remarks.append(f"The uploads of {old} are more than {self.max_staleness} rounds old and were not mixed.")
        return remarks


def _check(uploads: Mapping[str, Upload]) -> None:
    check_mixable(
        {client: upload.shared for client, upload in uploads.items()},
        {client: upload.architecture for client, upload in uploads.items()},
        {client: upload.sketch for client, upload in uploads.items()},
    )


def _greeting(uploads: Mapping[str, Upload], peers: Peers) -> SharedTensors:
    """The uniform mean of the common tensors that every client holds, for a client whose model is not known yet."""
    flats = [upload.shared.common for upload in uploads.values()]
    everywhere = set.intersection(*(set(flat.layout.names) for flat in flats))
    sources = [flat for flat, source in zip(flats, peers.sources, strict=True) if source] or flats
    return SharedTensors(weighted_mean([select(flat, everywhere) for flat in sources], [1.0] * len(sources)))
