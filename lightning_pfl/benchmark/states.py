"""The frozen lower layers of a vision-language module, run once per example instead of once per step.

Start at `LowerLayers`. Where adapters sit in the last layers only and the projector stays as it is, all that lies below
says the same of an example in every step. A `StateDataset` holds what enters the first layer that is kept, and the
module, once cut to its last layers, goes on from there: the same numbers as the whole model gives, in a fraction of the
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_pfl.adapters.readings import Reading
from lightning_pfl.benchmark._compat import keep_last_layers
from lightning_pfl.benchmark.batches import TaskDataset, collate
from lightning_pfl.benchmark.vlm import VisionLanguageModule

__all__ = ["LowerLayers", "StateDataset", "collate_states"]


@final
class LowerLayers:
    """Everything of a module below its last layers.

    Args:
        module: a whole module, without adapters.
        num_kept: how many of its last layers will be trained.

    Raises:
        ValueError: the module has no more layers than are to be kept.
    """

    def __init__(self, module: VisionLanguageModule, num_kept: int) -> None:
        layers = cast(nn.ModuleList, cast(Any, module.language_model).model.layers)
        if not 1 <= num_kept < len(layers):
            raise ValueError(
                f"`num_kept` must be at least 1 and below the model's {len(layers)} layers, but is {num_kept}."
            )
        self._module, self._num_kept = module, num_kept
        self._first = layers[len(layers) - num_kept]

    @torch.no_grad()
    def states(self, batch: dict[str, Tensor]) -> Tensor:
        """What enters the first layer that is kept, [b, t, hidden], of a batch as `collate` makes them."""
        found: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            found.append((args[0] if args else named["hidden_states"]).clone())
            raise _SeenEnough

        handle = self._first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._module.hidden_states(batch)
        except _SeenEnough:
            pass
        finally:
            handle.remove()
        return found[0]

    def reading(self, reading: Reading) -> Reading:
        """The same reading with states in place of pictures and words."""
        inputs = dict(reading.inputs)
        states = self.states(inputs)
        for name in ("features", "input_ids"):
            del inputs[name]
        return replace(reading, inputs={**inputs, "states": states})

    def cut(self) -> VisionLanguageModule:
        """Cut the module to its last layers, in place; afterwards it takes batches with ``states`` only."""
        keep_last_layers(cast(Any, self._module).language_model, self._num_kept)
        return self._module


@final
class StateDataset(Dataset[dict[str, Tensor]]):
    """Examples as the kept layers see them.

    Args:
        examples: tokenised for the module's language model.
        lower: layers that are run now, once.
        batch_size: examples at a time.
        report: called with (examples done, examples) after each batch.
    """

    def __init__(
        self,
        examples: TaskDataset,
        lower: LowerLayers,
        *,
        batch_size: int = 64,
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        states, self._ends = [], [0]
        self._options, self._answers = [], []
        for start in range(0, len(examples), batch_size):
            items = [examples[index] for index in range(start, min(start + batch_size, len(examples)))]
            found = lower.states(collate(items))
            for row, item in zip(found, items, strict=True):
                length = len(item["input_ids"])
                states.append(row[len(row) - length :])
                self._ends.append(self._ends[-1] + length)
                self._options.append(item["option_ids"].tolist())
                self._answers.append(int(item["answer"]))
            if report is not None:
                report(len(self._answers), len(examples))
        self._states = torch.cat(states) if states else torch.zeros(0, 0)

    def __len__(self) -> int:
        return len(self._answers)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "states": self._states[self._ends[index] : self._ends[index + 1]],
            "option_ids": torch.tensor(self._options[index]),
            "answer": torch.tensor(self._answers[index]),
        }


def collate_states(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pad items of a `StateDataset` to one batch: states on the left, options on the right.

    Example:
        >>> item = {"option_ids": torch.tensor([5]), "answer": torch.tensor(0)}
        >>> batch = collate_states([item | {"states": torch.ones(2, 3)}, item | {"states": torch.ones(1, 3)}])
        >>> batch["states"].shape, batch["attention_mask"].tolist()
        (torch.Size([2, 2, 3]), [[1, 1], [0, 1]])
    """
    rows = [item["states"].flip(0) for item in items]
    lengths = torch.tensor([len(row) for row in rows])
    return {
        "states": nn.utils.rnn.pad_sequence(rows, batch_first=True).flip(1),
        "attention_mask": (torch.arange(int(lengths.max())).flip(0) < lengths[:, None]).long(),
        "option_ids": nn.utils.rnn.pad_sequence(
            [item["option_ids"] for item in items], batch_first=True, padding_value=-1
        ),
        "answer": torch.stack([item["answer"] for item in items]),
    }


class _SeenEnough(Exception):
    """Leaves a forward pass at the first layer that is kept."""
