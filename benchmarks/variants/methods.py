"""What is compared: one `Method` each, as settings over the package's own policies and gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lightning_pfl.adapters.gates import Additive, Combine, Convex
from lightning_pfl.functional.pulling import Towards
from lightning_pfl.functional.relevance import FixedMatrix, Peers, Softmax, TaskGraph, TopK, Uniform, WeightPolicy

from .scenarios import ClientTasks, family_of


class Rows(Protocol):
    """A policy that may look at the uploads."""

    def rows(self, peers: Peers, P: Tensor) -> Tensor:
        """Weights ``[N, N]``, or ``[7, N, N]`` where every linear has its own, of uploads P ``[N, 7, r, r]``."""
        ...


@dataclass(frozen=True)
class Told:
    """A policy of the package, which looks at what `Peers` tell."""

    policy: WeightPolicy

    def rows(self, peers: Peers, P: Tensor) -> Tensor:
        return self.policy.rows(peers).float()


@dataclass(frozen=True)
class Blend:
    """A shared part beside the personal one: (1 - share) W + share * uniform."""

    of: Rows
    share: float

    def rows(self, peers: Peers, P: Tensor) -> Tensor:
        return torch.lerp(self.of.rows(peers, P), Uniform().rows(peers).float(), self.share)


@dataclass(frozen=True)
class PerLinear:
    """Relevance of every adapted linear by itself: cosines of the uploaded P instead of sketches."""

    policy: Softmax

    def rows(self, peers: Peers, P: Tensor) -> Tensor:
        flat = torch.nn.functional.normalize(P.flatten(2).transpose(0, 1), dim=2)  # [7, N, r r]
        alike = flat @ flat.transpose(1, 2)
        return torch.stack([self.policy.rows(replace(peers, similarity=one)).float() for one in alike])


@dataclass(frozen=True)
class Discounted:
    """Clients of another model count less: their weight times ``worth``, rows scaled up again."""

    of: Rows
    worth: float
    models: Mapping[str, str]

    def rows(self, peers: Peers, P: Tensor) -> Tensor:
        names = [self.models[client] for client in peers.client_ids]
        factor = torch.tensor([[1.0 if one == other else self.worth for other in names] for one in names])
        rows = self.of.rows(peers, P) * factor
        return rows / rows.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Halved:
    """Shrinkage without anybody: every client keeps a half of its own."""

    share: float = 0.5

    def rows(self, peers: Peers, P: Tensor) -> Tensor:
        return (1 - self.share) * torch.eye(len(peers.client_ids))


@dataclass(frozen=True)
class Method:
    """One way to exchange P and Q.

    Attributes:
        name: in the tables.
        combine: how a gate weighs the frozen mixture G against the client's own L; None: there is no G.
        mixture: of G; None: G stays zero.
        restart: of what L goes on from after a round; None: L is never touched.
        ema: share of the former G that a new one keeps.
        pull: weight of the squared distance of L from G in the loss.
        lr: of P and Q.
        lr_gate: of the gates.
        structure: methods of one structure share a learning rate, tuned on validation.
    """

    name: str
    combine: Combine | None = None
    mixture: Rows | None = None
    restart: Rows | None = None
    ema: float = 0.0
    pull: float = 0.0
    lr: float = 2e-2
    lr_gate: float = 5e-3
    structure: str = "local"


def variants(clients: Sequence[ClientTasks], seed: int, families: Mapping[str, list[str]]) -> list[Method]:
    """Everything that is compared in one scenario; the oracle knows who shares a family now."""
    oracle, friends = Told(TaskGraph(families)), Told(TaskGraph(families, include_self=True))
    near, sharp, paper = Told(Softmax(0.5)), Told(Softmax(0.25)), Told(Softmax(0.5, standardize=False))
    everyone, nobody = Told(Uniform()), Told(_own(clients))
    models = {client.id: client.model for client in clients}
    convex, additive = Convex(), Additive()

    def mix(name: str, mixture: Rows | None, **more: object) -> Method:
        return Method(name, convex, mixture, structure="convex", **more)  # type: ignore[arg-type]

    def add(name: str, mixture: Rows | None, **more: object) -> Method:
        return Method(name, additive, mixture, structure="additive", **more)  # type: ignore[arg-type]

    def warm(name: str, restart: Rows, **more: object) -> Method:
        return Method(name, restart=restart, structure="restart", **more)  # type: ignore[arg-type]

    def pulled(name: str, policy: WeightPolicy, share: float) -> Method:
        return replace(warm(name, Told(Towards(policy, share))), structure="pull")

    relatives = Softmax(0.25, include_self=False)
    return [
        Method("local"),
        Method("local, rate by accuracy alone", structure="accuracy"),
        mix("no exchange", nobody),
        mix("G = 0", None),
        add("no exchange, L + beta G", nobody),
        mix("paper: softmax 0.5 of cosines", paper),
        mix("standardised 0.5", near),
        mix("standardised 0.25", sharp),
        mix("top 3", Told(TopK(3, Softmax(0.5)))),
        mix("top 1", Told(TopK(1, Softmax(0.5)))),
        mix("uniform", everyone),
        mix("oracle", oracle),
        mix("stranger", Told(_strangers(clients, families, seed))),
        mix("per linear, by P", PerLinear(Softmax(0.5))),
        mix("0.25, a half uniform", Blend(sharp, 0.5)),
        mix("0.25, other model counts a half", Discounted(sharp, 0.5, models)),
        mix("oracle, own model only", Discounted(oracle, 0.0, models)),
        mix("0.25, EMA of G", sharp, ema=0.5),
        mix("0.25, proximal to G", sharp, pull=0.01),
        mix("0.25, slow gate", sharp, lr_gate=5e-4),
        add("L + beta G, 0.25", sharp),
        add("L + beta G, uniform", everyone),
        add("L + beta G, oracle", oracle),
        warm("restart from uniform (FedAvg)", Told(Uniform(include_self=True))),
        warm("restart from relatives and itself", Told(Softmax(0.25, include_self=True))),
        warm("restart from oracle", friends),
        warm("restart from a half of itself", Halved()),
        pulled("pull 0.3 to relatives", relatives, 0.3),
        pulled("pull 0.5 to relatives", relatives, 0.5),
        pulled("pull 0.3 to all", Uniform(include_self=True), 0.3),
        pulled("pull 0.3 to oracle", TaskGraph(families), 0.3),
        mix("0.25 + pull 0.3 to relatives", sharp, restart=Told(Towards(relatives, 0.3))),
        mix("0.25 + restart from uniform", sharp, restart=Told(Uniform(include_self=True))),
        mix("uniform + pull 0.3 to relatives", everyone, restart=Told(Towards(relatives, 0.3))),
    ]


SHORT = (
    "local",
    "no exchange",
    "paper: softmax 0.5 of cosines",
    "standardised 0.5",
    "standardised 0.25",
    "uniform",
    "oracle",
    "restart from uniform (FedAvg)",
    "restart from oracle",
    "pull 0.5 to relatives",
    "pull 0.3 to all",
    "0.25 + pull 0.3 to relatives",
)
"""For comparing alignments, and for the test side."""


def _own(clients: Sequence[ClientTasks]) -> FixedMatrix:
    return FixedMatrix({client.id: {client.id: 1.0} for client in clients})


def _strangers(clients: Sequence[ClientTasks], families: Mapping[str, list[str]], seed: int) -> FixedMatrix:
    """As many clients of one other family as a client has relatives."""
    names = sorted({family for one in families.values() for family in one})
    step = 1 + seed % (len(names) - 1)
    other = {family: names[(index + step) % len(names)] for index, family in enumerate(names)}
    return FixedMatrix(
        {
            client.id: {
                stranger.id: 1.0 for stranger in clients if families[stranger.id] == [other[families[client.id][0]]]
            }
            for client in clients
        }
    )


__all__ = ["SHORT", "Method", "Rows", "family_of", "variants"]
