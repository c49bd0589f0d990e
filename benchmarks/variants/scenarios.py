"""Who trains on what: twenty clients, four per family of tasks, two of these on each model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .materials import FAMILIES, MODELS


@dataclass(frozen=True)
class ClientTasks:
    """One client: its model, and the tasks that it trains on one after the other, for equally many rounds each."""

    id: str
    model: str
    tasks: tuple[str, ...]

    def at(self, round_: int, rounds: int) -> str:
        """Its task in a round."""
        return self.tasks[min(round_ * len(self.tasks) // rounds, len(self.tasks) - 1)]


def static(seed: int) -> tuple[ClientTasks, ...]:
    """One task each; which two domains of a family go to which model is dealt by the seed."""
    rng, clients = random.Random(f"static/{seed}"), []
    for family, domains in FAMILIES.items():
        dealt = rng.sample(domains, len(domains))
        for index, domain in enumerate(dealt):
            model = list(MODELS)[index % len(MODELS)]
            clients.append(ClientTasks(f"{family}-{domain}", model, (f"{family}-{domain}",)))
    return tuple(clients)


def dynamic(seed: int) -> tuple[ClientTasks, ...]:
    """Two tasks each, the second of the next family: at half time everybody's relatives change."""
    rng, first = random.Random(f"dynamic/{seed}"), static(seed)
    families = list(FAMILIES)
    later = {
        family: iter(rng.sample(FAMILIES[families[(index + 1) % len(families)]], 4))
        for index, family in enumerate(families)
    }
    clients = []
    for client in first:
        family = family_of(client.tasks[0])
        following = families[(families.index(family) + 1) % len(families)]
        clients.append(ClientTasks(client.id, client.model, (*client.tasks, f"{following}-{next(later[family])}")))
    return tuple(clients)


def family_of(task: str) -> str:
    """The part of a task's name that relatives share."""
    return task.partition("-")[0]


def families_by(clients: Sequence[ClientTasks], round_: int, rounds: int) -> dict[str, list[str]]:
    """Per client the family that it trains on in a round."""
    return {client.id: [family_of(client.at(round_, rounds))] for client in clients}
