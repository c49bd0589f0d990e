"""`FedAvg`: one model for all, the sample-weighted mean of the round's participants."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch

from lightning_pfl.aggregation.base import Aggregator
from lightning_pfl.aggregation.conventional import ConventionalMean, FactorMean
from lightning_pfl.aggregation.guard import UpdateGuard, check_mixable
from lightning_pfl.aggregation.memory import copied, dump_flat, load_flat, require_rule
from lightning_pfl.functional.averaging import select, weighted_mean
from lightning_pfl.functional.staleness import staleness_weight
from lightning_pfl.types import Aggregation, ClientUpdate, FlatTensors, Personalized, SharedTensors

__all__ = ["FedAvg"]

_RULE = "fedavg"


@final
class FedAvg(Aggregator):
    r"""Every client starts its next turn from the mean of the round's participants, weighted by their examples.

    P and Q (`SharedTensors.common`) are averaged over all participants that hold them, A and B over the participants of
    one architecture. A name that no participant of a round holds keeps its last mean. The mean overwrites the client's
    own adapter.

    Args:
        by_norm: weigh clients by the length of what they send instead of by their examples, :math:`\lVert \Delta W_k
            \rVert_F`: products B A of conventional layers, and P and Q, whose bases are orthonormal. HETLoRA's.
        global_branch: send the mean as the frozen global adapter G, too. For methods whose clients exchange a second
            adapter (`TwoAdapters`) that starts from the mean while their own one sees it fixed at its side.
        staleness_exponent: a, how fast an update that comes late (`UseLate`) loses weight: its examples count
            :math:`(1 + s)^{-a}` times, s rounds late. 0: it counts like any other.
        conventional: how A and B are averaged within an architecture. None: `FactorMean()`.
        guard: what an update must satisfy to count.

    Raises:
        ValueError: a negative exponent.

    Source:
        McMahan et al., AISTATS 2017, arXiv:1602.05629, Algorithm 1. Weights of late updates: FedBuff, Nguyen et al.,
        AISTATS 2022, arXiv:2106.06639, with a = 0.5. FedBuff adds changes to the server's model; here the mean of the
        clients' values takes its place, late or not.

    Example:
        >>> values = {"ward-3": (0.0, 1), "ward-7": (4.0, 3)}
        >>> updates = [
        ...     ClientUpdate(name, 0, number, "tiny", SharedTensors(FlatTensors.pack({"P": torch.tensor([value])})))
        ...     for name, (value, number) in values.items()
        ... ]
        >>> FedAvg().aggregate(updates, {}).personalized["ward-3"].start.common.vector
        tensor([3.])
    """

    def __init__(
        self,
        *,
        by_norm: bool = False,
        global_branch: bool = False,
        staleness_exponent: float = 0.0,
        conventional: ConventionalMean | None = None,
        guard: UpdateGuard | None = None,
    ) -> None:
        self.by_norm = by_norm
        self.global_branch = global_branch
        self.staleness_exponent = staleness_exponent
        staleness_weight(0, staleness_exponent)  # raises if it is out of range
        self.conventional = conventional or FactorMean()
        self.guard = guard or UpdateGuard()

    @property
    def uses_global_branch(self) -> bool:
        """As the user chose."""
        return self.global_branch

    @property
    def needs_sketches(self) -> bool:
        """False."""
        return False

    def aggregate(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any]) -> Aggregation:
        """Average this round's participants and send the mean to every known client."""
        require_rule(state, _RULE)
        accepted = self.guard.accept(updates)
        if not accepted:
            raise ValueError("There is nothing to average: no client has sent an update that counts.")
        last = load_flat(state["common"]) if state else FlatTensors.empty()
        bound = {name: load_flat(entry) for name, entry in state.get("architectures", {}).items()}
        members: dict[str, dict[str, Any]] = dict(state.get("clients", {}))
        here = {update.client_id for update in accepted}
        absent = {client: entry for client, entry in members.items() if client not in here}
        known = {
            client: SharedTensors(select(last, entry["names"]), bound[entry["architecture"]])
            for client, entry in _one_of_each(absent).items()
        }
        for update in accepted:
            names = list(update.shared.common.layout.names)
            members[update.client_id] = {"architecture": update.architecture, "names": names}
            known[update.client_id] = update.shared
        clients = {client: members[client] for client in sorted(members)}
        check_mixable(known, {client: clients[client]["architecture"] for client in known})
        weigh = {one.client_id: self._mass(one) * self._fresh(one) for one in accepted}
        if not sum(weigh.values()) > 0:  # nobody has moved, by norm
            weigh = dict.fromkeys(weigh, 1.0)
        common, notes = _renewed(last, accepted, weigh), []
        for architecture in sorted({update.architecture for update in accepted}):
            group = [update for update in accepted if update.architecture == architecture]
            mean = self.conventional.one(
                [update.shared.same_architecture for update in group], [weigh[update.client_id] for update in group]
            )
            bound[architecture] = mean.flats[0]
            notes += mean.notes
        everywhere = set.intersection(*(set(entry["names"]) for entry in _one_of_each(clients).values()))
        row = torch.tensor([float(weigh.get(client, 0)) for client in clients])
        sent = {
            _kind(entry): self._sent(
                SharedTensors(select(common, entry["names"]), copied(bound[entry["architecture"]]))
            )
            for entry in _one_of_each(clients).values()
        }
        return Aggregation(
            personalized={client: sent[_kind(entry)] for client, entry in clients.items()},
            newcomer=self._sent(SharedTensors(select(common, everywhere))),
            state={
                "rule": _RULE,
                "common": dump_flat(common),
                "architectures": {name: dump_flat(flat) for name, flat in bound.items()},
                "clients": clients,
            },
            client_ids=tuple(clients),
            weights=(row / row.sum()).expand(len(clients), -1),
            notes=tuple(notes),
        )

    def _sent(self, mean: SharedTensors) -> Personalized:
        return Personalized(frozen=mean if self.global_branch else None, start=mean)

    def _mass(self, update: ClientUpdate) -> float:
        return _norm(update.shared) if self.by_norm else float(update.num_examples)

    def _fresh(self, update: ClientUpdate) -> float:
        return staleness_weight(update.staleness, self.staleness_exponent)


def _kind(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """Clients of one kind receive the same."""
    return entry["architecture"], *entry["names"]


def _one_of_each(members: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """One client of each kind: a thousand clients are to cost as much memory as one."""
    return {client: members[client] for client in {_kind(entry): client for client, entry in members.items()}.values()}


def _norm(shared: SharedTensors) -> float:
    """Frobenius norm of what a client's adapters add to its weights and biases, all layers together."""
    bound, pairs = shared.same_architecture.unpack(), shared.same_architecture.layout.factors.values()
    squares = shared.common.vector.double().square().sum().item()
    for A, B in ((bound[a].double(), bound[b].double()) for a, b in pairs):
        squares += ((A @ A.T) * (B.T @ B)).sum().clamp(min=0.0).item()
    return math.sqrt(squares)


def _renewed(last: FlatTensors, updates: Sequence[ClientUpdate], weigh: Mapping[str, float]) -> FlatTensors:
    """The participants' mean, and the last mean of names that none of them holds."""
    mean = weighted_mean([update.shared.common for update in updates], [weigh[one.client_id] for one in updates])
    return FlatTensors.pack({**last.unpack(), **mean.unpack()})
