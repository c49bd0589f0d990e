"""The frozen lower layers of a vision-language module, run once per example instead of once per step.

Start at `LowerLayers`. Where adapters sit in the last layers only and the projector stays as it is, all that lies below
says the same of an example in every step. A `StateDataset` holds what enters the first layer that is kept, and the
module, once cut to its last layers, goes on from there: the same numbers as the whole model gives, in a fraction of the
time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, final

import torch
from safetensors.torch import load_file, save_file
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

    def digest(self) -> str:
        """Of the whole module's weights and of how many layers are kept; 64 hex characters."""
        told = hashlib.sha256(repr((self._num_kept, type(self._module.language_model).__name__)).encode())
        for name, tensor in sorted(self._module.state_dict().items()):
            told.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
            told.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return told.hexdigest()

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
        states: list[Tensor] = []
        self._ends: list[int] = [0]
        self._options: list[list[int]] = []
        self._answers: list[int] = []
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

    def save(self, path: Path) -> None:
        """Write all of it to a safetensors file, in one step."""
        numbers = {
            "ends": self._ends,
            "answers": self._answers,
            "options": [token for row in self._options for token in row],
            "counts": [len(row) for row in self._options],
        }
        tensors = {name: torch.tensor(values, dtype=torch.int64) for name, values in numbers.items()}
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        save_file({"states": self._states, **tensors}, partial)
        os.replace(partial, path)

    @staticmethod
    def load(path: Path) -> StateDataset:
        """Read what `save` wrote."""
        read = load_file(path)
        made = StateDataset.__new__(StateDataset)
        made._states, made._ends, made._answers = read["states"], read["ends"].tolist(), read["answers"].tolist()
        made._options = [row.tolist() for row in read["options"].split(read["counts"].tolist())]
        return made

    def with_options(self, rename: Callable[[Sequence[int]], list[int]]) -> StateDataset:
        """The same states with other names for the tokens of the choices (`vocabulary.KeptTokens.places`)."""
        made = StateDataset.__new__(StateDataset)
        made._states, made._ends, made._answers = self._states, self._ends, self._answers
        made._options = [rename(row) for row in self._options]
        return made

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
