"""Whose adapter would answer whose questions in a comparison, told from the questions alone?

    python -m benchmarks.routing benchmarks/results/suite-dynamic-heterogeneous.yaml

Nothing is trained: the questions of each client's training examples become its keys, as `RoutingKeys` makes them, and
the validation questions of all tasks are routed. Once `lightning-pfl benchmark tune` has filled the cache it takes half
a minute of one core.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor

from lightning_pfl.benchmark.packages import cache_dir
from lightning_pfl.callbacks.routing_keys import RoutingKeys
from lightning_pfl.comparison.data import collate_for_client, collate_questions, to_reader
from lightning_pfl.comparison.plan import read_comparison
from lightning_pfl.comparison.preparation import Prepared, prepare
from lightning_pfl.comparison.world import world_of
from lightning_pfl.demo.progress import DemoProgress
from lightning_pfl.functional.routing import Keys, Nearest, distances

MARGINS = (1.0, 1.25, 1.5, 2.0, 3.0)
GROUPS = (1, 4, 8, 16)


class Silent(DemoProgress):
    """Tells nothing."""

    def stage(self, what: str) -> None:
        pass

    def count(self, done: int, total: int) -> None:
        pass

    def close(self) -> None:
        pass


def main(path: str) -> None:
    """Print the tables, as Markdown."""
    torch.set_num_threads(1)
    comparison = replace(read_comparison(path), side="val")
    world = world_of(comparison.protocol, cache_dir())
    prepared = prepare(comparison, world, Silent())
    related = torch.tensor(world.relatedness(prepared.tasks)) > 0
    trained, asked = _read(prepared)
    at = ", ".join(f"{margin:g}" for margin in MARGINS)
    print(f"| groups | nearest is the owner | own stay at margin {at} | related kept | unrelated kept | to the owner |")
    print("| --- " * 6 + "|")
    for groups in GROUPS:
        _print(groups, prepared, [Keys.of(one, limit=groups) for one in trained], asked, related)


def _read(prepared: Prepared) -> tuple[list[Tensor], list[Tensor]]:
    """What training questions of each client look like, and validation questions of each task."""
    keys = RoutingKeys(prepared.probe, to_reader=to_reader)
    trained = []
    for client in prepared.clients:
        tasks = prepared.train[client.id]
        batches = [collate_for_client([task[index] for index in range(len(task))]) for task in tasks]
        trained.append(torch.cat([keys.read(batch) for batch in batches]))
    return trained, [keys.read(collate_questions(task)) for task in prepared.probed]


def _print(groups: int, prepared: Prepared, owners: list[Keys], asked: list[Tensor], related: Tensor) -> None:
    tasks = prepared.tasks
    own_of = {task: place for place, client in enumerate(prepared.clients) for task in client.tasks}
    shares: dict[str, list[Tensor]] = {"nearest": [], "own": [], "related": [], "unrelated": [], "owner": []}
    for column, task in enumerate(tasks):
        far = distances(asked[column], owners)
        shares["nearest"].append((far.argmin(dim=1) == own_of[task]).float().mean())
        for place, client in enumerate(prepared.clients):
            found = torch.stack([_owner(far, place, margin) for margin in MARGINS])
            stays = (found == place).float().mean(dim=1)
            if task in client.tasks:
                shares["own"].append(stays)
            elif related[column, [tasks.index(mine) for mine in client.tasks]].any():
                shares["related"].append(stays)
            else:
                shares["unrelated"].append(stays)
                shares["owner"].append((found == own_of[task]).float().mean(dim=1))
    means = {name: 100 * torch.stack(found).mean(dim=0) for name, found in shares.items()}
    print(f"| {groups} | {means.pop('nearest').item():.1f} |", end="")
    for values in means.values():
        print("", ", ".join(f"{value:.1f}" for value in values.tolist()), "|", end="")
    print(flush=True)


def _owner(far: Tensor, own: int, margin: float) -> Tensor:
    """Whose adapter answers each question, ``[n]``."""
    return Nearest(margin).weights(far, own=own).argmax(dim=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
