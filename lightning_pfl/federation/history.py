"""What a run remembers for its user: who counted how much for whom in every round, who did not, and what travelled.

`RelevanceRecord` is one round's N x N matrices; `RelevanceFile` keeps all of them as lines of JSON beside the run's
other logs. `LeftOut` says whose turn did not count, and why. `Traffic` counts bytes, `RoundTraffic` those of a round.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lightning_pfl.types import Aggregation

__all__ = ["LeftOut", "RelevanceFile", "RelevanceRecord", "RoundTraffic", "Traffic"]


@dataclass(frozen=True, eq=False)
class RelevanceRecord:
    """How one round's mixtures weighed the clients.

    Attributes:
        round: from 0.
        client_ids: of rows and columns.
        weights: shape ``[N, N]``, row i is client i's mixture. None where nothing was mixed.
        similarity: shape ``[N, N]``, cosine of sketches. None without sketches.
    """

    round: int
    client_ids: tuple[str, ...]
    weights: Tensor | None
    similarity: Tensor | None

    @staticmethod
    def of(round: int, aggregation: Aggregation) -> RelevanceRecord:
        """A round's record."""
        return RelevanceRecord(round, tuple(aggregation.client_ids), aggregation.weights, aggregation.similarity)

    def summary(self) -> dict[str, float]:
        """Numbers for the log.

        ``relevance/similarity`` is the mean over pairs of different clients; ``relevance/evenness`` the mean entropy of
        a row over the others, from 0 (all weight on one) to 1 (all alike).

        Example:
            >>> even = torch.tensor([[0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])
            >>> RelevanceRecord(0, ("a", "b", "c"), even, None).summary()
            {'relevance/evenness': 1.0}
        """
        result = {}
        count = len(self.client_ids)
        if self.similarity is not None and count > 1:
            known = self.similarity[~torch.eye(count, dtype=torch.bool)]
            known = known[torch.isfinite(known)]
            if known.numel():
                result["relevance/similarity"] = float(known.mean())
        if self.weights is not None and count > 2 and (evenness := _evenness(self.weights)) is not None:
            result["relevance/evenness"] = round(evenness, 6)
        return result

    def dump(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint."""
        return {
            "round": self.round,
            "client_ids": list(self.client_ids),
            "weights": self.weights,
            "similarity": self.similarity,
        }

    @staticmethod
    def load(entry: Mapping[str, Any]) -> RelevanceRecord:
        """Undo `dump`."""
        return RelevanceRecord(entry["round"], tuple(entry["client_ids"]), entry["weights"], entry["similarity"])


def _evenness(weights: Tensor) -> float | None:
    """Mean entropy of the rows without their own client, from 0 to 1; None if nobody weighs another.

    Rows that are one and the same in memory (`FedAvg`'s) are read once: their matrix would be as big as all of them.
    """
    own = weights.diagonal().double()
    rows = (weights[:1] if weights.stride(0) == 0 else weights).double()
    total = rows.sum(1) - own
    others = _information(rows).sum(1) - _information(own)
    entropy = others / total + total.log()  # of the others' shares of the total
    known = entropy[total > 1e-12]
    return float(known.mean().clamp(0.0, math.log(len(own) - 1))) / math.log(len(own) - 1) if known.numel() else None


def _information(weights: Tensor) -> Tensor:
    information: Tensor = -torch.special.xlogy(weights, weights)
    return information


@final
class RelevanceFile:
    """One line of JSON per round: ``round``, ``client_ids``, ``weights``, ``similarity``.

    Args:
        path: of the file; its folder is made when the first line is written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def restart(self, records: Iterable[RelevanceRecord]) -> None:
        """Write the rounds up to here, and no others: a run may have been resumed from an earlier one."""
        self.path.unlink(missing_ok=True)
        for record in records:
            self.append(record)

    def append(self, record: RelevanceRecord) -> None:
        """Add one round."""
        line = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in record.dump().items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class LeftOut:
    """A client whose turn did not count in a round.

    Attributes:
        round: from 0.
        client_id: whose turn.
        reason: in words.
    """

    round: int
    client_id: str
    reason: str


@dataclass(frozen=True)
class Traffic:
    """Bytes that travelled between one client and the server so far.

    Attributes:
        up: from the client.
        down: to the client.

    Example:
        >>> Traffic(up=10) + Traffic(up=5, down=1)
        Traffic(up=15, down=1)
    """

    up: int = 0
    down: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.up + other.up, self.down + other.down)


@dataclass(frozen=True, eq=False)
class RoundTraffic:
    """Bytes that travelled in one round.

    Attributes:
        round: from 0. What is sent to be evaluated after aggregation counts in the round that has ended.
        client_ids: who sent or received anything.
        up: int64, one per client: from it.
        down: the same, to it.

    Example:
        >>> RoundTraffic.of(3, {"ward-3": Traffic(up=10, down=4)}).by_client
        {'ward-3': Traffic(up=10, down=4)}
    """

    round: int
    client_ids: tuple[str, ...]
    up: Tensor
    down: Tensor

    @staticmethod
    def of(round: int, traffic: Mapping[str, Traffic]) -> RoundTraffic:
        """From what each client sent and received, in the order of ids, whoever came first."""
        names = sorted(traffic)
        pairs = torch.tensor([(traffic[one].up, traffic[one].down) for one in names], dtype=torch.int64).reshape(-1, 2)
        return RoundTraffic(round, tuple(names), pairs[:, 0], pairs[:, 1])

    @property
    def by_client(self) -> dict[str, Traffic]:
        """Per client."""
        return {
            client_id: Traffic(up, down)
            for client_id, up, down in zip(self.client_ids, self.up.tolist(), self.down.tolist(), strict=True)
        }

    def dump(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint."""
        return {"round": self.round, "client_ids": list(self.client_ids), "bytes": torch.stack([self.up, self.down])}

    @staticmethod
    def load(entry: Mapping[str, Any]) -> RoundTraffic:
        """Undo `dump`."""
        return RoundTraffic(entry["round"], tuple(entry["client_ids"]), *entry["bytes"])
