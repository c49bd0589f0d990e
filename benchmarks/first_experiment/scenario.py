"""Who owns which task when: eight clients (four per architecture), a family each (static) or two tasks in time
(dynamic).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from .suite import CHOSEN

CLIENTS = 8
ROUNDS = 8


@dataclass(frozen=True)
class Scenario:
    """Tasks of each client in time; client c runs architecture c // 4; ``novel`` are tasks nobody trains on."""

    name: str
    tasks: list[list[str]]
    novel: tuple[str, ...] = ("tint/photo", "tint/google")

    def at(self, client: int, round_: int) -> str:
        """The task a client trains on in a round."""
        own = self.tasks[client]
        return own[min(len(own) - 1, round_ * len(own) // ROUNDS)]

    def oracle(self, round_: int) -> Tensor:
        """[N, N] 1 where two different clients have trained on the same family by the latest of their uploads."""
        fam = [self.at(c, round_).partition("/")[0] for c in range(CLIENTS)]
        return torch.tensor([[float(i != j and fam[i] == fam[j]) for j in range(CLIENTS)] for i in range(CLIENTS)])

    def others(self, client: int) -> list[str]:
        """Tasks of the scenario that the client never trains on."""
        return sorted({t for own in self.tasks for t in own} - set(self.tasks[client]))


def scenario(name: str, seed: int) -> Scenario:
    """Families and domains are dealt anew by seed; relatives sit on different architectures and see different
    domains.
    """
    rng = random.Random(f"scenario/{seed}")
    fams = list(CHOSEN)
    rng.shuffle(fams)
    doms = {f: rng.sample(CHOSEN[f], 4) for f in fams}
    first = [f"{f}/{doms[f][0]}" for f in fams] + [f"{f}/{doms[f][1]}" for f in fams]
    if name == "static":
        return Scenario(name, [[t] for t in first])
    if name == "same":  # relatives on the same architecture: what exchange is worth when P means the same to both
        pairs = [f"{f}/{doms[f][k]}" for f in fams for k in (0, 1)]
        return Scenario(name, [[t] for t in pairs])
    # second half: the llama clients move one family on, the gemma clients two: new relatives, new domains
    second = [f"{fams[(i + 1) % 4]}/{doms[fams[(i + 1) % 4]][2]}" for i in range(4)]
    second += [f"{fams[(i + 2) % 4]}/{doms[fams[(i + 2) % 4]][3]}" for i in range(4)]
    return Scenario(name, [[a, b] for a, b in zip(first, second, strict=True)])
