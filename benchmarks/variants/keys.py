"""Does a question find whoever trained on such ones? What `functional.routing` makes of the tasks' questions.

    python -m benchmarks.variants keys

Nothing is trained: the questions of every client's training examples become its keys, and each task's validation
questions are routed. In the static scenario a client has one task, in the dynamic one two of two families. A minute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_pfl.functional.routing import Keys, Nearest, distances
from lightning_pfl.relevance import CountSketch
from lightning_pfl.relevance.prompt_states import pooled

from .materials import ANCHOR, TASKS, folder
from .scenarios import ClientTasks, dynamic, family_of, static

SEEDS = (0, 1, 2, 3, 4)
GROUPS = (1, 4, 8)
MARGINS = (1.0, 1.5, 2.0, 3.0)
NUM_TRAIN = 32
SIZES = (64, 128)


def keys() -> None:
    """Print the table, as Markdown."""
    read = {size: _read(size) for size in SIZES}
    at = ", ".join(f"{margin:g}" for margin in MARGINS)
    print(f"| scenario | numbers | groups | to its family | own stay at margin {at} | unrelated kept at margin {at} |")
    print("| --- " * 6 + "|")
    for name, scenario in (("static", static), ("dynamic", dynamic)):
        for size, groups in ((64, 8), *((128, groups) for groups in GROUPS)):
            found = [_routed(scenario(seed), read[size], seed, groups) for seed in SEEDS]
            family, own, kept = (sum(part) / len(SEEDS) for part in zip(*found, strict=True))
            shown = (", ".join(f"{100 * value:.1f}" for value in values.tolist()) for values in (own, kept))
            print(f"| {name} | {size} | {groups} | {100 * float(family):.1f} |", " | ".join(shown), "|", flush=True)


def _read(size: int) -> dict[tuple[str, str], Tensor]:
    """What each task's questions look like, ``[n, size]``, by task and side."""
    project, found = CountSketch(size), {}
    for task in TASKS:
        for side in ("train", "val"):
            states: Tensor = torch.load(folder() / f"{ANCHOR}-{task}-{side}.pt")[0]
            means = pooled(states, torch.ones(states.shape[:2]))
            found[task, side] = torch.stack([project(row) for row in means])
    return found


def _routed(
    clients: tuple[ClientTasks, ...], read: dict[tuple[str, str], Tensor], seed: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of questions that find an owner of their family; of own ones that stay; of unrelated ones that do."""
    generator = torch.Generator().manual_seed(seed)
    owners = []
    for client in clients:
        drawn = [
            read[task, "train"][torch.randperm(len(read[task, "train"]), generator=generator)[:NUM_TRAIN]]
            for task in client.tasks
        ]
        owners.append(Keys.of(torch.cat(drawn), limit=groups))
    families = [{family_of(task) for task in client.tasks} for client in clients]
    right, own, kept = [], [], []
    for task in TASKS:
        far = distances(read[task, "val"], owners)
        knows = torch.tensor([family_of(task) in known for known in families])
        right.append(knows[far.argmin(dim=1)].float().mean())
        for place, client in enumerate(clients):
            stays = torch.stack([(_owner(far, place, m) == place).float().mean() for m in MARGINS])
            if task in client.tasks:
                own.append(stays)
            elif not knows[place]:
                kept.append(stays)
    return torch.stack(right).mean(), torch.stack(own).mean(dim=0), torch.stack(kept).mean(dim=0)


def _owner(far: Tensor, own: int, margin: float) -> Tensor:
    """Whose adapter answers each question, ``[n]``."""
    return Nearest(margin).weights(far, own=own).argmax(dim=1)
