"""States of all texts in front of a model's last blocks, kept on disk: the only part that runs whole models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.alignment_transfer.bodies import MODELS, Body, States, Tail
from benchmarks.alignment_transfer.texts import Plan, Task
from lightning_pfl.adapters.contrasts import shared_words
from lightning_pfl.benchmark.packages import cache_dir

PARTS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Examples:
    """One part of a task as one model sees it.

    Attributes:
        states: of the texts.
        words: tokens of the answers, ``[answers]``.
        labels: index of each text's answer.
    """

    states: States
    words: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Model:
    """What is left of a model once all texts are read.

    Attributes:
        name: of `MODELS`.
        tail: its last blocks.
        public: its states of the public texts.
        examples: by task and part.
        vocabulary: the tokens of words, as `shared_words` finds them alone.
    """

    name: str
    tail: Tail
    public: States
    examples: Mapping[tuple[str, str], Examples]
    vocabulary: Mapping[str, int]


def load(name: str, plan: Plan, num_blocks: int) -> Model:
    """Read all texts of a plan with one model, or what an earlier run has read."""
    digest = hashlib.sha256(repr((plan, num_blocks, MODELS[name])).encode()).hexdigest()[:16]
    path = cache_dir() / "alignment_transfer" / f"{name}-{digest}.pt"
    body = Body(name, num_blocks)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"public": _packed(body.states(plan.public))}
        for title, task in plan.tasks.items():
            for part in PARTS:
                kept[f"{title}|{part}"] = _packed(body.states([task.prompt.format(x) for x, _ in getattr(task, part)]))
        torch.save(kept, path)
    kept = {key: States(*value) for key, value in torch.load(path, weights_only=True).items()}
    examples = {
        (title, part): Examples(
            kept[f"{title}|{part}"], _answers(body, task), torch.tensor([label for _, label in getattr(task, part)])
        )
        for title, task in plan.tasks.items()
        for part in PARTS
    }
    return Model(name, body.tail(), kept["public"], examples, body.tokenizer.get_vocab())


def words_of(models: Mapping[str, Model]) -> dict[str, Tensor]:
    """Words that are one token for all models, as `align` draws contrasts from."""

    class Vocabulary:
        def __init__(self, words: Mapping[str, int]) -> None:
            self.words = words

        def get_vocab(self) -> Mapping[str, int]:
            return self.words

    return shared_words({name: Vocabulary(model.vocabulary) for name, model in models.items()})


def _packed(states: States) -> tuple[Tensor, Tensor, Tensor]:
    return states.hidden, states.lengths, states.places


def _answers(body: Body, task: Task) -> Tensor:
    cut = [body.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in task.answers]
    assert all(len(tokens) == 1 for tokens in cut), f"{body.name} cuts an answer of {task.answers}"
    return torch.tensor([tokens[0] for tokens in cut])
