"""How clients do that took no part: each starts from what the run has for it, and trains on its own task.

Start at `welcome`. This is the paper's experiment on unseen tasks, with a method's own rule for who comes later
(`FederatedStrategy.personalize_new`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_pfl.benchmark.vlm import VisionLanguageModule
from lightning_pfl.comparison.data import ClientExamples, collate_for_client
from lightning_pfl.comparison.evaluation import Questions
from lightning_pfl.comparison.preparation import Unseen
from lightning_pfl.federation import Client, FederatedStrategy

__all__ = ["Arrival", "welcome"]


@dataclass(frozen=True)
class Arrival:
    """One newcomer.

    Attributes:
        task: its name.
        model: key of its language model.
        chance: accuracy of answering without looking.
        steps: after how many optimizer steps of its own it was asked, from 0.
        right: right answers, for each of `steps`.
        total: questions.
        weights: how its start weighs the run's clients, by id; empty where the method knows no mixture for one client.
    """

    task: str
    model: str
    chance: float
    steps: Sequence[int]
    right: Sequence[int]
    total: int
    weights: Mapping[str, float]


def welcome(
    strategy: FederatedStrategy,
    unseen: Sequence[Unseen],
    source: Callable[[str], Callable[[], VisionLanguageModule]],
    adapters: Sequence[L.Callback],
    *,
    steps: Sequence[int],
    batch_size: int,
    questions_at_once: int,
    seed: int,
    accelerator: str,
) -> list[Arrival]:
    """Let newcomers start from a run that has ended, train on, and be asked.

    Args:
        strategy: of the run.
        unseen: one newcomer each.
        source: what makes a module, by the key of a language model.
        adapters: the method's `CoLoRA`, if it has one.
        steps: after how many steps questions are asked, increasing; 0: before any.
        batch_size: examples per step.
        questions_at_once: in one batch.
        seed: of the batches.
        accelerator: as a Trainer takes it.
    """
    found = []
    for one in unseen:
        data = _Rows(one.train, batch_size, seed)
        client = Client(f"newcomer-{one.model}-{one.task}", model=source(one.model), datamodule=data)
        start = strategy.personalize_new(client)
        module = cast(VisionLanguageModule, start.module)
        questions = Questions(one.questions, questions_at_once)
        asked = _Asked(questions, steps)
        asked.ask(module, 0)
        if steps[-1]:
            L.seed_everything(seed, verbose=False)
            trainer = L.Trainer(
                max_steps=steps[-1],
                accelerator=accelerator,
                devices=1,
                callbacks=[*adapters, asked],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module.train(), data)
        right, total = list(asked.right()), len(questions)
        found.append(Arrival(one.task, one.model, one.chance, list(steps), right, total, dict(start.weights)))
    return found


@final
class _Rows(L.LightningDataModule):
    """A task's examples, shuffled by a seed."""

    def __init__(self, examples: ClientExamples, batch_size: int, seed: int) -> None:
        super().__init__()
        self._examples, self._batch_size, self._seed = examples, batch_size, seed

    @override
    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self._seed)
        return DataLoader(
            self._examples, self._batch_size, shuffle=True, collate_fn=collate_for_client, generator=generator
        )


@final
class _Asked(L.Callback):
    """Asks after steps that it is told."""

    def __init__(self, questions: Questions, steps: Sequence[int]) -> None:
        self._questions, self._steps, self._right = questions, steps, dict[int, int]()

    def ask(self, module: VisionLanguageModule, step: int) -> None:
        if step in self._steps and step not in self._right:
            training = module.training
            with torch.no_grad():
                self._right[step] = self._questions.right(module.eval(), len(self._questions))
            module.train(training)

    def right(self) -> Iterator[int]:
        return (self._right[step] for step in self._steps)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.ask(cast(VisionLanguageModule, pl_module), trainer.global_step)
