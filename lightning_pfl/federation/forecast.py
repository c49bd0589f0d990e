"""`Forecast`: how many clients run at a time, and how long a round takes, before anything runs.

Start at `forecast`. It goes through a round on paper, with the bookkeeping by which a pool places workers
(`Placement`) and with how long each client's last turn took, where that is known.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from lightning_pfl.federation.client import Client
from lightning_pfl.federation.pools.placement import Demand, Placement, longest_first

__all__ = ["Forecast", "duration", "forecast"]


@final
@dataclass(frozen=True)
class Forecast:
    """A round on paper.

    Attributes:
        num_clients: that take part.
        at_a_time: the most that run at once.
        seconds: of a round; None where no client has run yet.

    Example:
        >>> print(Forecast(num_clients=12, at_a_time=3, seconds=250.0))
        12 clients, 3 at a time, about 4 min a round
        >>> print(Forecast(num_clients=12, at_a_time=3, seconds=None))
        12 clients, 3 at a time; how long a round takes is known after the first
    """

    num_clients: int
    at_a_time: int
    seconds: float | None

    def __str__(self) -> str:
        """In one line."""
        clients = f"{self.num_clients} client{'' if self.num_clients == 1 else 's'}, {self.at_a_time} at a time"
        if self.seconds is None:
            return f"{clients}; how long a round takes is known after the first"
        return f"{clients}, about {duration(self.seconds)} a round"


def forecast(clients: Sequence[Client], room: Placement, *, num_clients: int, seconds: Mapping[str, float]) -> Forecast:
    """Go through a round.

    Args:
        clients: all of the run, which fit into the room one by one.
        room: with nothing taken; used up.
        num_clients: how many of them take part in a round.
        seconds: how long a client's turn takes, by id; for who is not there, the mean of the others.

    Example:
        >>> clients = [Client("a"), Client("b"), Client("big", num_cpus=2)]
        >>> room = Placement({"here": {"CPU": 2.0}}, limit=None)
        >>> forecast(clients, room, num_clients=3, seconds={"a": 60.0, "b": 50.0, "big": 100.0})
        Forecast(num_clients=3, at_a_time=2, seconds=160.0)
    """
    usual = sum(seconds.values()) / len(seconds) if seconds else 1.0
    taking_part = longest_first([client.id for client in clients], seconds)[:num_clients]
    demands = {client.id: Demand.of(client) for client in clients}
    waiting: dict[Demand, deque[str]] = {}
    for client_id in taking_part:
        waiting.setdefault(demands[client_id], deque()).append(client_id)
    running: list[tuple[float, int, str, Demand]] = []  # when it ends, a number that tells ties apart, where, what
    now, most, begun = 0.0, 0, 0
    while any(waiting.values()) or running:
        for demand, queue in waiting.items():
            while queue and (node := room.take(demand)) is not None:
                begun += 1
                heapq.heappush(running, (now + seconds.get(queue.popleft(), usual), begun, node, demand))
        assert running, "every client fits somewhere as a whole"
        most = max(most, len(running))
        now, _, node, demand = heapq.heappop(running)
        room.give_back(node, demand)
    return Forecast(len(taking_part), most, now if seconds else None)


def duration(seconds: float) -> str:
    """A time in words, rounded to what one wants to know.

    Example:
        >>> [duration(value) for value in (0.34, 59.0, 250.0, 5400.0, 200_000.0)]
        ['0.3 s', '59 s', '4 min', '1 h 30 min', '2 d 7 h']
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h"
