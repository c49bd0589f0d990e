"""What a client trains on in a round: only what is new, or also what it remembers.

Start at `CountReplay`, the paper's memory. A policy is asked once per round and is a pure function of the memory before
the round, the new rows and a seed, so a turn that is run again trains on the same batches. The memory that it leaves is
plain tensors and travels in the client's checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["CountReplay", "Memory", "NewRowsOnly", "Replay"]


@dataclass(frozen=True, eq=False)
class Memory:
    """What a client remembers.

    Attributes:
        rows: row numbers, int64, shape ``[m]``.
        counts: how often each was trained on, decayed, float64, shape ``[m]``.
    """

    rows: Tensor
    counts: Tensor

    @staticmethod
    def empty() -> Memory:
        """Nothing yet."""
        return Memory(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.float64))


class Replay(ABC):
    """Chooses a round's training rows."""

    @abstractmethod
    def draw(
        self, memory: Memory, new_rows: Tensor, *, num_steps: int, batch_size: int, seed: int
    ) -> tuple[Tensor, Memory]:
        """Choose.

        Args:
            memory: before the round; left alone.
            new_rows: what the round brings, at least one row.
            num_steps: optimizer steps.
            batch_size: rows per step.
            seed: of everything that is drawn.

        Returns:
            Row numbers, shape ``[num_steps * batch_size]``, one batch after another, and the memory after the round.
        """


@final
class CountReplay(Replay):
    """Everything seen so far may come again; what came often comes less.

    New rows enter the memory one by one. Each earns ``num_steps / len(new_rows)`` of a batch, and for every whole batch
    earned: all counts are multiplied by ``decay``, ``batch_size`` different rows are drawn one after another with
    probabilities softmax(-counts / temperature), and their counts rise by one. A memory smaller than a batch is
    repeated to fill it. When the memory is full, a row drawn at random makes room.

    Args:
        capacity: rows that are remembered at most.
        temperature: above 0; the smaller, the more strictly rows take turns.
        decay: of counts per batch, above 0 to 1.

    Raises:
        ValueError: a number out of range.

    Source:
        The streaming memory of Co-LoRA's code (arXiv:2506.11024), with its numbers. It adds up fractions in
        floating point and draws an extra batch when rounding loses one; batches earned are counted exactly here.

    Example:
        >>> rows, memory = CountReplay().draw(Memory.empty(), torch.arange(4), num_steps=2, batch_size=2, seed=0)
        >>> len(rows), memory.rows.tolist()
        (4, [0, 1, 2, 3])
    """

    def __init__(self, *, capacity: int = 100_000, temperature: float = 0.125, decay: float = 0.99) -> None:
        if capacity < 1:
            raise ValueError(f"`capacity` must be at least 1, but is {capacity}.")
        if temperature <= 0:
            raise ValueError(f"`temperature` must be above 0, but is {temperature}.")
        if not 0 < decay <= 1:
            raise ValueError(f"`decay` must be above 0 and at most 1, but is {decay}.")
        self.capacity = capacity
        self.temperature = temperature
        self.decay = decay

    def draw(
        self, memory: Memory, new_rows: Tensor, *, num_steps: int, batch_size: int, seed: int
    ) -> tuple[Tensor, Memory]:
        """See `Replay.draw`."""
        _check_new(new_rows)
        generator = torch.Generator().manual_seed(seed)
        rows = torch.cat([memory.rows, new_rows])  # the first `size` of them are in the memory
        counts = torch.cat([memory.counts.double(), torch.zeros(len(new_rows), dtype=torch.float64)])
        size = len(memory.rows)
        batches: list[Tensor] = []
        for index, row in enumerate(new_rows):
            if size < self.capacity:
                place, size = size, size + 1
            else:
                place = int(torch.randint(size, (1,), generator=generator))
            rows[place], counts[place] = row, 0.0
            earned = (index + 1) * num_steps // len(new_rows)
            while len(batches) < earned:
                counts[:size] *= self.decay
                drawn = self._draw(counts[:size], batch_size, generator)
                counts[drawn] += 1
                batches.append(rows[drawn.repeat(-(-batch_size // len(drawn)))[:batch_size]])
        return torch.cat(batches), Memory(rows[:size].clone(), counts[:size].clone())

    def _draw(self, counts: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
        # the largest of log-probabilities with Gumbel noise are draws one after another without replacement
        uniform = torch.rand(len(counts), generator=generator, dtype=torch.float64).clamp(min=1e-300)
        keys = -counts / self.temperature - (-uniform.log()).log()
        return keys.topk(min(batch_size, len(counts))).indices


@final
class NewRowsOnly(Replay):
    """Train on the round's own rows and forget them: shuffled, and again from the start when they do not last.

    Example:
        >>> rows, memory = NewRowsOnly().draw(Memory.empty(), torch.tensor([7, 8]), num_steps=2, batch_size=2, seed=0)
        >>> sorted(rows.tolist()), len(memory.rows)
        ([7, 7, 8, 8], 0)
    """

    def draw(
        self, memory: Memory, new_rows: Tensor, *, num_steps: int, batch_size: int, seed: int
    ) -> tuple[Tensor, Memory]:
        """See `Replay.draw`."""
        _check_new(new_rows)
        generator = torch.Generator().manual_seed(seed)
        wanted = num_steps * batch_size
        passes = [
            new_rows[torch.randperm(len(new_rows), generator=generator)] for _ in range(-(-wanted // len(new_rows)))
        ]
        return torch.cat(passes)[:wanted], memory


def _check_new(new_rows: Tensor) -> None:
    if not len(new_rows):
        raise ValueError("A round without new rows has nothing to draw; the client should sit it out.")
