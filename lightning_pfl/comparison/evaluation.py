"""How right every client's model is on every task, after some rounds.

Start at `Evaluator`, a callback of the server. It asks two models of a client: the one that its own training of the
round has left, which is what the method's paper scores, and at the end also the one that it has after aggregation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_pfl.benchmark.vlm import VisionLanguageModule
from lightning_pfl.comparison.data import Examples, collate_examples, collate_questions
from lightning_pfl.comparison.plan import Protocol
from lightning_pfl.comparison.preparation import Prepared
from lightning_pfl.federation import Experts, FederatedStrategy
from lightning_pfl.functional.routing import Answering

__all__ = ["AGGREGATED", "TRAINED", "Evaluator", "Questions", "Table"]

TRAINED, AGGREGATED = "trained", "aggregated"
"""Of which model: before the server has answered the round, or after."""


@dataclass(frozen=True)
class Table:
    """One evaluated round.

    Attributes:
        round: how many had been run.
        moment: `TRAINED` or `AGGREGATED`.
        right: right answers, ``[clients][tasks]``.
        total: questions, ``[clients][tasks]``; 0 where none was asked.
    """

    round: int
    moment: str
    right: Sequence[Sequence[int]]
    total: Sequence[Sequence[int]]


@final
class Questions:
    """A task's questions in batches that are made once.

    Args:
        examples: in the order in which the first ones are taken.
        batch_size: questions at a time.
    """

    def __init__(self, examples: Examples, batch_size: int) -> None:
        self._examples, self._batch_size = examples, batch_size
        self._batches: dict[int, list[dict[str, Tensor]]] = {}

    def __len__(self) -> int:
        return len(self._examples)

    def right(
        self,
        module: VisionLanguageModule,
        count: int,
        *,
        experts: Experts | None = None,
        weights: Tensor | None = None,
    ) -> int:
        """How many of the first so many questions a model answers right.

        Args:
            module: the model.
            count: of questions.
            experts: answer in its place, with its own adapter and others'. None: it answers itself.
            weights: how much each owner's adapter counts for each question; with `experts`.
        """
        if count not in self._batches:
            items = [self._examples[index] for index in range(min(count, len(self)))]
            starts = range(0, len(items), self._batch_size)
            self._batches[count] = [collate_examples(items[at : at + self._batch_size]) for at in starts]
        right, at = 0, 0
        for batch in self._batches[count]:
            batch = {name: tensor.to(module.device) for name, tensor in batch.items()}
            size = len(batch["answer"])
            if experts is None:
                right += int(_correct(module, batch).sum())
            else:
                assert weights is not None
                right += int(experts.answer(batch, _correct, weights=weights[at : at + size]).sum())
            at += size
        return right


def _correct(module: Any, batch: dict[str, Tensor]) -> Tensor:
    """Which questions are answered right, bool ``[b]``."""
    correct: Tensor = module.score(batch).correct
    return correct


@final
class Evaluator(L.Callback):
    """Tests clients' models after the rounds that a protocol names; what it found travels in the run's checkpoint.

    Args:
        prepared: clients and questions.
        questions: by key of a model, per task.
        protocol: when, and how many questions.
        exchanges: whether aggregation changes a client's model at all.
        answering: the method's (`Method.answering`): None: clients' own models answer.
        device: where models are asked.
        tell: is told how many rounds are done.

    Attributes:
        tables: so far.
        seconds: of this process and of those before that the run was resumed from, by what they were spent on.
        held: bytes of others' adapters and keys that reached each client to be asked with, by id: in every evaluated
            round all of them.
    """

    federated_scope = "server"

    def __init__(
        self,
        prepared: Prepared,
        questions: dict[str, list[Questions]],
        protocol: Protocol,
        *,
        exchanges: bool,
        answering: Answering | None,
        device: torch.device,
        tell: Callable[[int], None],
    ) -> None:
        self._prepared, self._questions, self._protocol = prepared, questions, protocol
        self._exchanges, self._answering, self._device, self._tell = exchanges, answering, device, tell
        self.tables: list[Table] = []
        self.seconds = {"training": 0.0, "evaluation": 0.0}
        self.held: dict[str, int] = {}
        self._read: list[Tensor] = []  # what each task's questions look like
        self._mark = 0.0

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._mark = time.process_time()

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done, protocol = trainer.current_epoch + 1, self._protocol
        start = time.process_time()
        self.seconds["training"] += start - self._mark
        others = done in protocol.others_at
        if done in protocol.self_at or others:
            trained = self._ask(trainer, pl_module, done, TRAINED, others=others)
            self.tables.append(trained)
            if done == protocol.num_rounds:
                if self._exchanges:
                    self.tables.append(self._ask(trainer, pl_module, done, AGGREGATED, others=others))
                else:
                    self.tables.append(Table(done, AGGREGATED, trained.right, trained.total))
        self.seconds["evaluation"] += time.process_time() - start
        self._tell(done)

    @override
    def state_dict(self) -> dict[str, Any]:
        tables = [vars(table) for table in self.tables]
        return {"tables": tables, "seconds": dict(self.seconds), "held": dict(self.held)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tables = [Table(**table) for table in state_dict["tables"]]
        self.seconds, self.held = dict(state_dict["seconds"]), dict(state_dict.get("held", {}))

    def _ask(self, trainer: L.Trainer, server: L.LightningModule, done: int, moment: str, *, others: bool) -> Table:
        strategy, tasks, protocol = trainer.strategy, self._prepared.tasks, self._protocol
        assert isinstance(strategy, FederatedStrategy)
        right = [[0] * len(tasks) for _ in self._prepared.clients]
        total = [[0] * len(tasks) for _ in self._prepared.clients]
        for row, client in enumerate(self._prepared.clients):
            experts, aggregated = None, moment == AGGREGATED
            if self._answering is None:
                module = strategy.personalize(server, client.id, aggregated=aggregated)
            else:
                experts = strategy.experts(server, client.id, aggregated=aggregated, answering=self._answering)
                module = experts.module
                if not aggregated:
                    self.held[client.id] = self.held.get(client.id, 0) + experts.nbytes
            assert isinstance(module, VisionLanguageModule)
            module.to(self._device)
            for column, (task, asked) in enumerate(zip(tasks, self._questions[client.model], strict=True)):
                count = protocol.num_self if task in client.tasks else protocol.num_others if others else 0
                count = min(count, len(asked))
                if count:
                    weights = None if experts is None else experts.weigh(self._looks(experts)[column][:count])
                    right[row][column] = asked.right(module, count, experts=experts, weights=weights)
                    total[row][column] = count
        return Table(done, moment, right, total)

    def _looks(self, experts: Experts) -> list[Tensor]:
        """What each task's questions look like, ``[n, k]``; read once, as all clients read alike."""
        if not self._read:
            self._read = [experts.read(collate_questions(task)) for task in self._prepared.probed]
        return self._read
