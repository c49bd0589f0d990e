"""What is new to a client in which round: all its tasks at once, or one after another.

Start at `DynamicStream` (the paper's default) and `StaticStream`. A stream knows only how many rows each of a client's
tasks has; a row's number counts through the tasks laid end to end, as in a ``ConcatDataset``. A task of 0 rows is an
idle slot: rounds that fall into it bring nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from math import ceil
from typing import final

import torch
from torch import Tensor

__all__ = ["DynamicStream", "StaticStream", "Stream"]


class Stream(ABC):
    """A client's rows by round; the same for the same arguments, wherever and however often it is asked.

    Attributes:
        sizes: rows per task, in the order of time.
        num_rounds: how many rounds it feeds.
    """

    sizes: tuple[int, ...]
    num_rounds: int

    @abstractmethod
    def new_rows(self, round: int) -> Tensor:
        """Row numbers that a round brings, int64, in the order in which they come.

        Raises:
            ValueError: a round outside 0 to ``num_rounds - 1``.
        """

    @property
    def idle_rounds(self) -> tuple[int, ...]:
        """Rounds that bring nothing: the client sits them out."""
        return tuple(round for round in range(self.num_rounds) if not len(self.new_rows(round)))

    def tasks_in(self, round: int) -> tuple[int, ...]:
        """Which tasks a round's rows belong to, in the order of time; the reference books a round under the first."""
        ends = torch.tensor(list(accumulate(self.sizes)))
        tasks = torch.bucketize(self.new_rows(round), ends, right=True)
        return tuple(int(task) for task in tasks.unique(sorted=True))

    @property
    def starts(self) -> tuple[int | None, ...]:
        """Per task the first round that brings some of it; None for an idle slot."""
        first: dict[int, int] = {}
        for round in range(self.num_rounds):
            for task in self.tasks_in(round):
                first.setdefault(task, round)
        return tuple(first.get(task) for task in range(len(self.sizes)))


@final
class StaticStream(Stream):
    """All tasks mixed: their rows are shuffled together and cut into one piece per round.

    Args:
        sizes: rows per task.
        num_rounds: pieces.
        seed: of the shuffle.

    Raises:
        ValueError: no task, a negative size, or less than one round.

    Source:
        PFL-static of Co-LoRA (arXiv:2506.11024). Its code drops the remainder of the division; here pieces differ by
        one row at most and together hold every row once.

    Example:
        >>> stream = StaticStream([2, 3], num_rounds=2, seed=0)
        >>> [len(stream.new_rows(round)) for round in range(2)], stream.tasks_in(0)
        ([3, 2], (0, 1))
    """

    def __init__(self, sizes: Sequence[int], num_rounds: int, *, seed: int = 0) -> None:
        self.sizes = _checked(sizes)
        if num_rounds < 1:
            raise ValueError(f"`num_rounds` must be at least 1, but is {num_rounds}.")
        self.num_rounds = num_rounds
        order = torch.randperm(sum(self.sizes), generator=torch.Generator().manual_seed(seed))
        self._pieces = order.tensor_split(num_rounds)

    def new_rows(self, round: int) -> Tensor:
        """The round's piece."""
        _check_round(round, self.num_rounds)
        return self._pieces[round].clone()


@final
class DynamicStream(Stream):
    """Tasks one after another, each for the same number of rounds, whole or fractional.

    With R rounds per task, round r brings what lies between r / R and (r + 1) / R on a line on which every task has
    length one: for R = 2.5 the third round brings the last fifth of the first task and the first fifth of the second.

    Args:
        sizes: rows per task, in the order of time; 0 for an idle slot.
        rounds_per_task: R, above 0; 1/2 gives two tasks a round. A float is taken as the fraction it is written as.
        orders: per task the order in which its rows come, a permutation (`drifting_order`). None: shuffled.
        seed: of the shuffles.

    Raises:
        ValueError: no task, a negative size, R not positive, or an order that is no permutation of its task's rows.

    Source:
        PFL-dynamic of Co-LoRA (arXiv:2506.11024) with 5 rounds for each of 4 tasks. Its code cuts at ``int(fraction *
        rows)`` in floating point; cuts here are exact, so every row comes exactly once.

    Example:
        >>> stream = DynamicStream([4, 6], rounds_per_task=2, seed=0)
        >>> [len(stream.new_rows(round)) for round in range(stream.num_rounds)], stream.starts
        ([2, 2, 3, 3], (0, 2))
        >>> DynamicStream([10, 10], rounds_per_task=2.5).tasks_in(2)
        (0, 1)
    """

    def __init__(
        self,
        sizes: Sequence[int],
        rounds_per_task: float | Fraction,
        *,
        orders: Sequence[Tensor | None] | None = None,
        seed: int = 0,
    ) -> None:
        self.sizes = _checked(sizes)
        self.rounds_per_task = Fraction(str(rounds_per_task))
        if self.rounds_per_task <= 0:
            raise ValueError(f"`rounds_per_task` must be above 0, but is {rounds_per_task}.")
        self.num_rounds = ceil(self.rounds_per_task * len(self.sizes))
        if orders is not None and len(orders) != len(self.sizes):
            raise ValueError(f"`orders` must hold one order (or None) per task, {len(self.sizes)}, not {len(orders)}.")
        generator = torch.Generator().manual_seed(seed)
        starts = [0, *accumulate(self.sizes)]
        self._tasks: list[Tensor] = []
        for task, size in enumerate(self.sizes):
            order = torch.randperm(size, generator=generator)  # drawn even if unused: other tasks' orders do not move
            if orders is not None and (given := orders[task]) is not None:
                if sorted(given.tolist()) != list(range(size)):
                    raise ValueError(f"`orders[{task}]` must hold each of the task's {size} rows once, but does not.")
                order = given
            self._tasks.append(order + starts[task])

    def new_rows(self, round: int) -> Tensor:
        """The rows of all tasks that the round passes, in the order of time."""
        _check_round(round, self.num_rounds)
        begin, end = round / self.rounds_per_task, (round + 1) / self.rounds_per_task
        pieces = []
        for task in range(int(begin), min(ceil(end), len(self.sizes))):
            rows = self._tasks[task]
            start, stop = max(begin - task, Fraction(0)), min(end - task, Fraction(1))
            pieces.append(rows[int(start * len(rows)) : int(stop * len(rows))])
        return torch.cat(pieces)


def _checked(sizes: Sequence[int]) -> tuple[int, ...]:
    if not sizes or min(sizes) < 0:
        raise ValueError(f"`sizes` must hold the number of rows of at least one task, 0 or more each, but is {sizes}.")
    return tuple(sizes)


def _check_round(round: int, num_rounds: int) -> None:
    if not 0 <= round < num_rounds:
        raise ValueError(
            f"The stream has rounds 0 to {num_rounds - 1}, but was asked for {round}. Let `max_epochs` be "
            f"{num_rounds}, or give the stream more rounds."
        )
