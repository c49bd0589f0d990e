"""`StreamDataModule`: one client's tasks as they come, round by round."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, cast, final

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler

from lightning_pfl.data.replay import CountReplay, Memory, Replay
from lightning_pfl.data.streams import Stream

__all__ = ["StreamDataModule"]

_LOG = logging.getLogger(__name__)


@final
class StreamDataModule(L.LightningDataModule):
    """Feed a client the rows that its stream brings in a round, and what its memory holds.

    One epoch is one round, of ``num_steps`` batches: leave the strategy's ``local_epochs`` at 1 and ``local_steps`` at
    None, and let ``max_epochs`` be the stream's number of rounds. A round is the federation's
    (``trainer.strategy.round``): a client that does not take part misses what the round would have brought. What was
    trained on stands in the client's checkpoint, so a run that is stopped and resumed trains on the same batches.

    A round that brings nothing is sat out: the client uploads what it had, its optimizer and schedule stand still, and
    the log says so. `Stream.idle_rounds` counts such rounds for the report (`idle_rows`). A client whose tasks are
    all empty sits out every round.

    In a Trainer without a federation an epoch is a round too, and rounds that bring nothing are passed over.

    Args:
        tasks: map-style data sets in the order of time, as many rows each as ``stream.sizes`` says.
        stream: what is new in which round.
        num_steps: batches per round, whatever the round brings (`matched_steps`).
        batch_size: rows per batch.
        replay: what is trained on. None: `CountReplay`, the paper's memory.
        val: one data set, or several.
        test: as ``val``.
        eval_batch_size: of validation and test; None: as ``batch_size``.
        collate_fn: as for a DataLoader.
        num_workers: of all loaders.
        seed: of the draws, together with the client's id and the round.

    Raises:
        ValueError: data sets that do not fit the stream, fewer than one step or row; when a loader is made, a round
            that the stream does not have, or a strategy that cuts rounds elsewhere.

    Example:
        >>> from lightning_pfl.data import DynamicStream
        >>> cats, dogs = range(10), range(100, 120)
        >>> data = StreamDataModule([cats, dogs], DynamicStream([10, 20], rounds_per_task=1), num_steps=3, batch_size=2)
        >>> len(data.train_dataloader())
        3
    """

    def __init__(
        self,
        tasks: Sequence[Dataset[Any] | Sequence[Any]],
        stream: Stream,
        *,
        num_steps: int,
        batch_size: int = 4,
        replay: Replay | None = None,
        val: Dataset[Any] | Sequence[Dataset[Any]] | None = None,
        test: Dataset[Any] | Sequence[Dataset[Any]] | None = None,
        eval_batch_size: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = tuple(len(cast(Sized, task)) for task in tasks)
        if sizes != stream.sizes:
            raise ValueError(f"`tasks` must have the rows that the stream counts, {stream.sizes}, but have {sizes}.")
        for name, number in (("num_steps", num_steps), ("batch_size", batch_size)):
            if number < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {number}.")
        self.stream = stream
        self.num_steps, self.batch_size = num_steps, batch_size
        self._replay = replay or CountReplay()
        filled = [cast(Dataset[Any], task) for task in tasks if len(cast(Sized, task))]
        self._train = ConcatDataset(filled) if filled else cast(Dataset[Any], ())  # every round is sat out
        self._val, self._test = val, test
        self._eval_batch_size = eval_batch_size or batch_size
        self._collate, self._num_workers, self._seed = collate_fn, num_workers, seed
        self._before, self._after = Memory.empty(), Memory.empty()
        self._planned: int | None = None
        self._plan = torch.zeros(0, dtype=torch.long)
        self._busy = [round for round in range(stream.num_rounds) if round not in set(stream.idle_rounds)]

    @property
    def memory(self) -> Memory:
        """What the client remembers after the last round that it trained in."""
        return self._after

    def train_dataloader(self) -> DataLoader[Any]:
        """The round's batches; none in a round that brings nothing."""
        self._check_strategy()
        client_id, round = self._where()
        if round in self.stream.idle_rounds:
            _LOG.warning(
                "Client `%s` has no data in round %d and sits it out; its adapters stay as they are.", client_id, round
            )
        return self._loader(self._train, self.batch_size, sampler=_RoundSampler(self))

    def val_dataloader(self) -> Any:
        """One loader, or one per data set; none without data."""
        return self._evaluation(self._val)

    def test_dataloader(self) -> Any:
        """One loader, or one per data set; none without data."""
        return self._evaluation(self._test)

    @property
    def num_rows(self) -> int:
        """How many rows an epoch has; Lightning asks when the last one is over, too."""
        strategy = getattr(self.trainer, "strategy", None)
        idle = getattr(strategy, "client_id", None) is not None and self._where()[1] in self.stream.idle_rounds
        return 0 if idle else self.num_steps * self.batch_size

    def rows(self) -> Tensor:
        """Row numbers of the current round in the order of training, ``[num_steps * batch_size]`` or none."""
        client_id, round = self._where()
        if round != self._planned:
            if self._planned is not None:
                self._before = self._after
            new, self._planned = self.stream.new_rows(round), round
            if len(new):
                self._plan, self._after = self._replay.draw(
                    self._before,
                    new,
                    num_steps=self.num_steps,
                    batch_size=self.batch_size,
                    seed=_number(f"round {round} of {client_id} of {self._seed}"),
                )
            else:
                self._plan, self._after = new, self._before
        return self._plan

    def state_dict(self) -> dict[str, Any]:
        """The memory, as plain tensors."""
        return {"rows": self._after.rows, "counts": self._after.counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a memory."""
        self._before = self._after = Memory(state_dict["rows"], state_dict["counts"])
        self._planned = None

    def _where(self) -> tuple[str | None, int]:
        """Whose data, and which round."""
        strategy = getattr(self.trainer, "strategy", None)
        client_id, round = getattr(strategy, "client_id", None), getattr(strategy, "round", None)
        if client_id is not None and round is not None:
            return client_id, round
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        if epoch >= len(self._busy):
            raise ValueError(
                f"The stream has {len(self._busy)} rounds with data, but this is epoch {epoch}. "
                f"Let `max_epochs` be at most {len(self._busy)}."
            )
        return None, self._busy[epoch]

    def _check_strategy(self) -> None:
        strategy = getattr(self.trainer, "strategy", None)
        steps = getattr(strategy, "local_steps", None)
        if steps is not None and steps != self.num_steps:
            raise ValueError(
                f"A stream's round is one epoch of `num_steps`={self.num_steps} batches, but the strategy ends a turn "
                f"after `local_steps`={steps}. Leave `local_steps` at None and set `num_steps`."
            )

    def _evaluation(self, data: Dataset[Any] | Sequence[Dataset[Any]] | None) -> Any:
        if data is None:
            return []
        if isinstance(data, (list, tuple)):
            return [self._loader(one, self._eval_batch_size) for one in data]
        return self._loader(cast(Dataset[Any], data), self._eval_batch_size)

    def _loader(self, data: Dataset[Any], batch_size: int, sampler: Sampler[int] | None = None) -> DataLoader[Any]:
        return DataLoader(data, batch_size, sampler=sampler, collate_fn=self._collate, num_workers=self._num_workers)


@final
class _RoundSampler(Sampler[int]):
    """The current round's rows, looked up when an epoch begins."""

    def __init__(self, data: StreamDataModule) -> None:
        self._data = data

    def __iter__(self) -> Iterator[int]:
        return iter(self._data.rows().tolist())

    def __len__(self) -> int:
        return self._data.num_rows


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
