"""How many workers of which size fit on which node. Pure bookkeeping: nothing here starts anything.

Start at `Placement`. A worker is as big as what its clients ask for (`Demand`), and clients that ask for the same
share workers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from lightning_pfl.federation.client import Client

__all__ = ["Demand", "Placement", "check_fit", "longest_first"]

_SLACK = 1e-6  # fractions of a GPU add up to a whole one only nearly


@dataclass(frozen=True)
class Demand:
    """What one turn takes from a node.

    Attributes:
        num_cpus: CPUs.
        num_gpus: GPUs, fractions allowed.
        resources: further resources, sorted by name.

    Example:
        >>> Demand.of(Client("ward-3", num_gpus=0.25)).amounts
        {'CPU': 1, 'GPU': 0.25}
    """

    num_cpus: float
    num_gpus: float
    resources: tuple[tuple[str, float], ...] = ()

    @staticmethod
    def of(client: Client) -> Demand:
        """What a client asks for."""
        return Demand(client.num_cpus, client.num_gpus, tuple(sorted(client.resources.items())))

    @property
    def amounts(self) -> dict[str, float]:
        """Per resource, by the names that clusters use, how much; without zeros."""
        amounts = {"CPU": self.num_cpus, "GPU": self.num_gpus, **dict(self.resources)}
        return {name: amount for name, amount in amounts.items() if amount > 0}


def check_fit(clients: Sequence[Client], nodes: Mapping[str, Mapping[str, float]]) -> None:
    """Check that every client fits on some node as a whole.

    Args:
        clients: with what they ask for.
        nodes: per node, by resource, what it has in total.

    Raises:
        ValueError: a client asks for more than any node has.

    Example:
        >>> check_fit([Client("ward-3", num_gpus=2)], {"node": {"CPU": 8.0, "GPU": 1.0}})
        Traceback (most recent call last):
        ...
        ValueError: Client `ward-3` asks for GPU=2, but the most that a node has is GPU=1 (1 node). ...
    """
    for client in clients:
        demand = Demand.of(client).amounts
        if any(_fits(demand, free) for free in nodes.values()):
            continue
        most = {name: max((free.get(name, 0.0) for free in nodes.values()), default=0.0) for name in demand}
        short = {name: amount for name, amount in demand.items() if amount > most[name] + _SLACK} or demand
        asked = ", ".join(f"{name}={amount:g}" for name, amount in short.items())
        has = ", ".join(f"{name}={most[name]:g}" for name in short)
        together = "" if short is not demand else ", and no node has all of it together"
        count = f"{len(nodes)} node{'' if len(nodes) == 1 else 's'}"
        raise ValueError(
            f"Client `{client.id}` asks for {asked}, but the most that a node has is {has} ({count}){together}. Ask "
            "for less in `Client(num_cpus=, num_gpus=, resources=)`, or connect to a larger cluster with "
            "`RayPool(address=...)`."
        )


@final
class Placement:
    """Keeps account of what is free on each node.

    Args:
        nodes: per node, by resource, what it has in total.
        limit: how many workers there may be at once; None: as many as fit.

    Example:
        >>> placement = Placement({"node": {"CPU": 2.0}}, limit=None)
        >>> one = Demand(1, 0)
        >>> placement.take(one), placement.take(one), placement.take(one)
        ('node', 'node', None)
        >>> placement.give_back("node", one)
        >>> placement.take(one)
        'node'
    """

    def __init__(self, nodes: Mapping[str, Mapping[str, float]], *, limit: int | None) -> None:
        self._total = {node: dict(amounts) for node, amounts in nodes.items()}
        self._free = {node: dict(amounts) for node, amounts in nodes.items()}
        self._places = limit

    def take(self, demand: Demand) -> str | None:
        """Reserve room for one worker on the emptiest node that has it; None when there is none."""
        if self._places == 0:
            return None
        amounts = demand.amounts
        fitting = [node for node, free in self._free.items() if _fits(amounts, free)]
        if not fitting:
            return None
        node = max(fitting, key=lambda node: self._free[node].get("CPU", 0.0))
        for name, amount in amounts.items():
            self._free[node][name] -= amount
        if self._places is not None:
            self._places -= 1
        return node

    def give_back(self, node: str, demand: Demand) -> None:
        """Free what `take` reserved, unless the node is gone."""
        if node in self._free:
            for name, amount in demand.amounts.items():
                self._free[node][name] += amount
        if self._places is not None:
            self._places += 1

    def forget_all_but(self, alive: Collection[str]) -> set[str]:
        """Strike out nodes that are gone.

        Returns:
            Which ones that were.

        Example:
            >>> placement = Placement({"near": {"CPU": 1.0}, "far": {"CPU": 1.0, "GPU": 1.0}}, limit=None)
            >>> placement.forget_all_but(["near"]), placement.ever_fits(Demand(1, 0)), placement.ever_fits(Demand(1, 1))
            ({'far'}, True, False)
        """
        gone = set(self._free) - set(alive)
        for node in gone:
            del self._free[node], self._total[node]
        return gone

    def welcome(self, nodes: Mapping[str, Mapping[str, float]]) -> set[str]:
        """Take in nodes that have joined; those that are known stay as they are.

        Returns:
            Which ones are new.

        Example:
            >>> placement = Placement({"near": {"CPU": 1.0}}, limit=None)
            >>> placement.welcome({"near": {"CPU": 1.0}, "far": {"CPU": 4.0}}), placement.take(Demand(2, 0))
            ({'far'}, 'far')
        """
        new = set(nodes) - set(self._free)
        for node in new:
            self._total[node], self._free[node] = dict(nodes[node]), dict(nodes[node])
        return new

    def ever_fits(self, demand: Demand) -> bool:
        """Whether some node could hold such a worker if nothing else ran on it."""
        return any(_fits(demand.amounts, total) for total in self._total.values())


def longest_first(client_ids: Sequence[str], seconds: Mapping[str, float]) -> list[str]:
    """Clients in the order in which a round is over soonest: the longest turns first, unknown ones before all.

    Source:
        Longest processing time first: Graham, SIAM Journal on Applied Mathematics 17 (1969); at most 4/3 of the best.

    Example:
        >>> longest_first(["a", "b", "c", "d"], {"a": 1.0, "b": 9.0, "d": 4.0})
        ['c', 'b', 'd', 'a']
    """
    return sorted(client_ids, key=lambda client_id: -seconds.get(client_id, float("inf")))


def _fits(amounts: Mapping[str, float], free: Mapping[str, float]) -> bool:
    return all(amount <= free.get(name, 0.0) + _SLACK for name, amount in amounts.items())
