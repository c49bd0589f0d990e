"""`Stacking`: what clients have learned in a round is added up without error, and stays beside what they learn next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from lightning_pfl.aggregation.base import Aggregator
from lightning_pfl.aggregation.guard import UpdateGuard, check_mixable
from lightning_pfl.aggregation.memory import copied, dump_flat, load_flat, require_rule
from lightning_pfl.functional.averaging import select, weighted_mean
from lightning_pfl.types import Aggregation, ClientUpdate, FlatTensors, Personalized, SharedTensors

__all__ = ["Stacking"]

_RULE = "stacking"


@final
class Stacking(Aggregator):
    r"""The server keeps the sum of all rounds' mean products, :math:`G^{t+1} = G^t + \sum_k \frac{n_k}{n} B_k A_k`.

    :math:`[B_G, B_1 \dots B_N] [A_G; \frac{n_1}{n} A_1; \dots; \frac{n_N}{n} A_N]`: stacking the factors is adding the
    products, whatever their ranks, while averaging them is not. Once a layer's stack has more rows than the layer has
    inputs or outputs, it is written as the product that it is, so that it grows no further. P and Q, whose bases are
    the same for all, are averaged and added. Clients hold the sum as their frozen global branch, which may have another
    rank than their own adapter, and start that anew (`FreshStart`).

    Args:
        guard: what an update must satisfy to count.

    Source:
        FLoRA, Wang et al., NeurIPS 2024, arXiv:2409.05976, equation 4. There clients add the round's stack to their
        base weights; here the base stays as it is, and who has missed a round loses nothing, since the whole sum is
        sent.

    Example:
        >>> one = SharedTensors(same_architecture=FlatTensors.pack({"0.A": torch.ones(1, 2), "0.B": torch.ones(2, 1)}))
        >>> updates = [ClientUpdate(name, 0, 1, "tiny", one) for name in "ab"]
        >>> G = Stacking().aggregate(updates, {}).personalized["a"].frozen.same_architecture.unpack()
        >>> G["0.B"] @ G["0.A"]
        tensor([[1., 1.],
                [1., 1.]])
    """

    def __init__(self, *, guard: UpdateGuard | None = None) -> None:
        self.guard = guard or UpdateGuard()

    @property
    def uses_global_branch(self) -> bool:
        """True: it holds the sum."""
        return True

    @property
    def needs_sketches(self) -> bool:
        """False."""
        return False

    def aggregate(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any]) -> Aggregation:
        """Add the round's mean to the sum and send that to every known client."""
        require_rule(state, _RULE)
        accepted = sorted(self.guard.accept(updates), key=lambda one: one.client_id)
        if not accepted:
            raise ValueError("There is nothing to add: no client has sent an update that counts.")
        check_mixable(
            {one.client_id: one.shared for one in accepted}, {one.client_id: one.architecture for one in accepted}
        )
        common = load_flat(state["common"]) if state else FlatTensors.empty()
        bound = {name: load_flat(entry) for name, entry in state.get("architectures", {}).items()}
        members: dict[str, dict[str, Any]] = dict(state.get("clients", {}))
        for one in accepted:
            names = list(one.shared.common.layout.names)
            members[one.client_id] = {"architecture": one.architecture, "names": names}
        clients = {client: members[client] for client in sorted(members)}
        counts = [float(one.num_examples) for one in accepted]
        common = _added(common, weighted_mean([one.shared.common for one in accepted], counts))
        for architecture in sorted({one.architecture for one in accepted}):
            group = [one for one in accepted if one.architecture == architecture]
            bound[architecture] = _stacked(
                bound.get(architecture, FlatTensors.empty()),
                [one.shared.same_architecture for one in group],
                [float(one.num_examples) for one in group],
            )
        everywhere = set.intersection(*(set(entry["names"]) for entry in clients.values()))
        examples = {one.client_id: float(one.num_examples) for one in accepted}
        row = torch.tensor([examples.get(client, 0.0) for client in clients])
        return Aggregation(
            personalized={
                client: Personalized(
                    frozen=SharedTensors(select(common, entry["names"]), copied(bound[entry["architecture"]]))
                )
                for client, entry in clients.items()
            },
            newcomer=Personalized(frozen=SharedTensors(select(common, everywhere))),
            state={
                "rule": _RULE,
                "common": dump_flat(common),
                "architectures": {name: dump_flat(flat) for name, flat in bound.items()},
                "clients": clients,
            },
            client_ids=tuple(clients),
            weights=(row / row.sum()).repeat(len(clients), 1),
        )


def _added(total: FlatTensors, more: FlatTensors) -> FlatTensors:
    """Name by name; what only one of the two holds is that one's."""
    mine = total.unpack()
    added = {name: mine[name] + value if name in mine else value for name, value in more.unpack().items()}
    return FlatTensors.pack({**mine, **added})


def _stacked(total: FlatTensors, flats: Sequence[FlatTensors], counts: Sequence[float]) -> FlatTensors:
    """The sum and the weighted mean of the round's products, as factors; what is no factor is averaged and added."""
    pairs = flats[0].layout.factors
    paired = {name for pair in pairs.values() for name in pair}
    mean = weighted_mean(flats, counts)
    result = _added(
        select(total, [name for name in total.layout.names if name not in paired]),
        select(mean, [name for name in mean.layout.names if name not in paired]),
    ).unpack()
    before, tensors = total.unpack(), [flat.unpack() for flat in flats]
    for a, b in pairs.values():
        A = [one[a] * (count / sum(counts)) for one, count in zip(tensors, counts, strict=True)]
        B = [one[b] for one in tensors]
        if a in before:
            A, B = [before[a], *A], [before[b], *B]
        result[a], result[b] = _short(torch.cat(A), torch.cat(B, dim=1))
    return FlatTensors.pack(result)


def _short(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product whose rank is at most the smaller width."""
    if A.shape[0] <= min(A.shape[1], B.shape[0]):
        return A, B
    product = B @ A
    if product.shape[0] <= product.shape[1]:
        return product, torch.eye(product.shape[0])
    return torch.eye(product.shape[1]), product
