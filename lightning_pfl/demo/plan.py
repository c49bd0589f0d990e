"""What the demo runs: which clients on which models and tasks, for how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_pfl.benchmark.weights import GEMMA3_270M, SMOLLM2_135M

__all__ = ["ClientPlan", "ModelPlan", "Plan", "full_plan"]


@dataclass(frozen=True)
class ModelPlan:
    """One architecture.

    Attributes:
        name: of the language model, as `benchmark.weights.load_language_model` takes it.
        num_layers: how many of its layers are kept; None keeps all.
        lr: learning rate of gates.
        lr_pq: learning rate of P and Q.
    """

    name: str
    num_layers: int | None
    lr: float
    lr_pq: float


@dataclass(frozen=True)
class ClientPlan:
    """One client.

    Attributes:
        id: as in the tables.
        model: key into `Plan.models`.
        task: name of its task.
    """

    id: str
    model: str
    task: str


@dataclass(frozen=True)
class Plan:
    """A run of the demo.

    Attributes:
        models: by a short key.
        anchor: key of the model that the others are aligned to; it is also the relevance probe.
        clients: who takes part.
        rounds: federated rounds.
        steps: optimizer steps per client and round.
        batch_size: examples per step.
        num_train: training examples per client.
        num_val: validation examples per client.
        num_test: test examples per task.
        rank: of the adapters.
        alpha: the scale of an adapter is alpha / rank.
        public_versions: how often, each time edited in another way, the alignment reads every public picture.
        seed: of everything.
    """

    models: Mapping[str, ModelPlan]
    anchor: str
    clients: Sequence[ClientPlan]
    rounds: int
    steps: int
    batch_size: int = 8
    num_train: int = 32
    num_val: int = 64
    num_test: int = 100
    rank: int = 16
    alpha: float = 32
    public_versions: int = 2
    seed: int = 0


def full_plan() -> Plan:
    """Nine clients on two families of language models; each task has two relatives, at least one on the other."""
    domains = {
        "kind": ("google", "fluent", "art4apps"),
        "defect": ("photo", "art4apps", "fluent"),
        "count": ("art4apps", "photo", "google"),
    }
    return Plan(
        models={
            "smollm2": ModelPlan(SMOLLM2_135M, num_layers=None, lr=5e-3, lr_pq=8e-2),
            "gemma3": ModelPlan(GEMMA3_270M, num_layers=None, lr=5e-3, lr_pq=8e-2),
        },
        anchor="smollm2",
        clients=_clients(domains, ("smollm2", "gemma3")),
        rounds=5,
        steps=16,
    )


def _clients(domains: Mapping[str, Sequence[str]], models: Sequence[str]) -> tuple[ClientPlan, ...]:
    """A client per family and domain; models alternate over all of them."""
    names = [f"{family}-{domain}" for family, found in domains.items() for domain in found]
    return tuple(ClientPlan(name, models[index % len(models)], name) for index, name in enumerate(names))
