"""What a client trains on, as its own model reads it and, beside that, as the relevance probe does.

Start at `ClientExamples`. One batch serves both, so that the probe sees the very examples that are trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_pfl.benchmark.batches import TaskDataset, collate
from lightning_pfl.benchmark.states import StateDataset, collate_states

__all__ = [
    "ClientExamples",
    "Examples",
    "PublicSet",
    "answer_logits",
    "answer_losses",
    "answer_outputs",
    "collate_examples",
    "collate_for_client",
    "collate_questions",
    "to_probe",
    "to_reader",
]

Examples = TaskDataset | StateDataset
"""A task as a whole model reads it, or as a model's last layers do."""


@final
class ClientExamples(Dataset[dict[str, Tensor]]):
    """Examples of one task for one client.

    Args:
        own: as the client's model reads them.
        probe: the same ones as the probe's last layer reads them.

    Raises:
        ValueError: another number of examples.
    """

    def __init__(self, own: Examples, probe: StateDataset) -> None:
        if len(own) != len(probe):
            raise ValueError(f"Both readings must be of the same examples, but there are {len(own)} and {len(probe)}.")
        self._own, self._probe = own, probe

    def __len__(self) -> int:
        return len(self._own)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        seen = self._probe[index]
        return {
            **self._own[index],
            "probe_states": seen["states"],
            "probe_answer": seen["option_ids"][seen["answer"]],
        }


def collate_examples(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of either kind of examples."""
    return (collate_states if "states" in items[0] else collate)(items)


def collate_for_client(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of `ClientExamples`.

    ``probe_states`` are padded on the left with zeros, and ``probe_mask`` says where.
    """
    return {
        **collate_examples(items),
        **_as_probed([item["probe_states"] for item in items]),
        "probe_answer": torch.stack([item["probe_answer"] for item in items]),
    }


def collate_questions(examples: StateDataset) -> dict[str, Tensor]:
    """All questions of a task as `to_reader` takes them, without their answers."""
    return _as_probed([examples[index]["states"] for index in range(len(examples))])


def _as_probed(states: Sequence[Tensor]) -> dict[str, Tensor]:
    rows = [one.flip(0) for one in states]
    lengths = torch.tensor([len(row) for row in rows])
    return {
        "probe_states": nn.utils.rnn.pad_sequence(rows, batch_first=True).flip(1),
        "probe_mask": (torch.arange(int(lengths.max())).flip(0) < lengths[:, None]).long(),
    }


def to_probe(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a `CausalLMProbe` takes of a batch of `collate_for_client`: the answer is one more position's label.

    Example:
        >>> batch = {"probe_states": torch.zeros(1, 2, 4), "probe_mask": torch.tensor([[0, 1]])}
        >>> probe = to_probe(batch | {"probe_answer": torch.tensor([7])})
        >>> probe["labels"].tolist(), probe["attention_mask"].tolist(), tuple(probe["inputs_embeds"].shape)
        ([[-100, -100, 7]], [[0, 1, 1]], (1, 3, 4))
    """
    mask = nn.functional.pad(batch["probe_mask"], (0, 1), value=1)
    labels = torch.full_like(mask, -100)
    labels[:, -1] = batch["probe_answer"]
    states = nn.functional.pad(batch["probe_states"], (0, 0, 0, 1))  # what stands there bears on nothing before it
    return {"inputs_embeds": states, "attention_mask": mask, "labels": labels}


def to_reader(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What reads questions of a batch of `collate_for_client` or `collate_questions`: no answers.

    Example:
        >>> batch = {"probe_states": torch.zeros(1, 2, 4), "probe_mask": torch.tensor([[0, 1]])}
        >>> sorted(to_reader(batch | {"probe_answer": torch.tensor([7])}))
        ['attention_mask', 'inputs_embeds']
    """
    return {"inputs_embeds": batch["probe_states"], "attention_mask": batch["probe_mask"]}


@final
@dataclass(frozen=True, eq=False)
class PublicSet:
    """Public pictures for distillation: which of some words, that all vocabularies have, comes after each?

    Attributes:
        batches: by the width of the model that reads them.
    """

    batches: Mapping[int, Sequence[dict[str, Tensor]]]

    def __call__(self, module: Any) -> list[dict[str, Tensor]]:
        """The batches as a client's model reads them, on its device."""
        found = self.batches[module.projector.hidden]
        return [{name: tensor.to(module.device) for name, tensor in batch.items()} for batch in found]


_LOWEST = -1e4  # stands for minus infinity, of which a divergence would make NaN


def answer_logits(module: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits of the offered answers, ``[n, c]``, very low where an example offers fewer."""
    logits: Tensor = module(batch)
    return logits.clamp(min=_LOWEST)


def answer_outputs(module: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The training loss and the logits of a batch, in one pass."""
    logits = answer_logits(module, batch)
    return nn.functional.cross_entropy(logits, batch["answer"]), logits


def answer_losses(module: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss of every row and the logits of a batch, in one pass."""
    logits = answer_logits(module, batch)
    return nn.functional.cross_entropy(logits, batch["answer"], reduction="none"), logits
