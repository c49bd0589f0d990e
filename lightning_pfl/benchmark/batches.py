"""Tasks as tensors: prompts tokenised, features looked up, batches padded on the left.

Start at `TaskData`, a LightningDataModule of one task. A batch is a dict of tensors:

    features        [b, images * 5, width]  float16, zero where an example shows fewer pictures
    input_ids       [b, t]                  text tokens; `IMAGE_ID` where a visual token goes; padded on the left
    attention_mask  [b, t]                  0 on padding
    option_ids      [b, c]                  first token of each choice; -1 where an example has fewer choices
    answer          [b]                     index of the right choice
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, final

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_pfl.benchmark.features import TOKENS_PER_IMAGE, FeatureStore
from lightning_pfl.benchmark.tasks import IMAGE_MARK, Example, Task, option_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_ID = -1
"""Stands in `input_ids` where a visual token goes; no vocabulary has it."""


ANSWER = "\nAnswer:"
"""Ends every prompt; what follows is the model's answer."""


def start_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that begins every prompt: beginning of text or, for vocabularies without one, end of text.

    Deep models put attention that has nowhere to go onto the first token; a word or a picture there would be spoiled.

    Raises:
        ValueError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise ValueError(
        f"{type(tokenizer).__name__} has neither a beginning-of-text nor an end-of-text token to begin a prompt with. "
        "Set its `bos_token`."
    )


def prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of one prompt: start, question, visual tokens of all pictures, "Answer:".

    Pictures come after the question, so that the states of their tokens can depend on what is asked.
    """
    text = example.question.replace(IMAGE_MARK, "").strip()
    question, answer = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, ANSWER))
    return [start_id(tokenizer), *question, *[IMAGE_ID] * (TOKENS_PER_IMAGE * len(example.images)), *answer]


@final
class TaskDataset(Dataset[dict[str, Tensor]]):
    """Examples with a closed list of answers, as unpadded tensors in memory.

    Args:
        examples: what to ask.
        tokenizer: of the language model that will answer.
        store: where the pictures' features come from.

    Raises:
        ValueError: an example without choices, an answer that is none of them, or choices that the tokenizer begins
            with the same token; the message names the example.
    """

    def __init__(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, store: FeatureStore) -> None:
        self.examples = tuple(examples)
        width = store.encoder.width
        views = [view for example in self.examples for view in example.images]
        tokens = store.tokens(views) if views else torch.zeros(0, TOKENS_PER_IMAGE, width, dtype=torch.float16)
        options: dict[tuple[str, ...], list[int]] = {}
        for example in self.examples:
            if example.choices not in options:
                options[example.choices] = _first_tokens(example, tokenizer)
            if example.answer not in example.choices:
                raise ValueError(
                    f"The answer of {example.id} must be one of its choices {list(example.choices)}, but is "
                    f"{example.answer!r}. Open questions need generation, not a closed list."
                )
        # few large tensors and plain lists: thousands of small tensors would be slow to pickle
        self._features = tokens.flatten(0, 1)
        self._ends = list(accumulate(TOKENS_PER_IMAGE * len(example.images) for example in self.examples))
        self._prompts = [prompt_ids(example, tokenizer) for example in self.examples]
        self._options = [list(options[example.choices]) for example in self.examples]
        self._answers = [example.choices.index(example.answer) for example in self.examples]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def options(self) -> Sequence[Sequence[int]]:
        """First token of each choice, per example."""
        return self._options

    def digest(self) -> str:
        """Of all that a model is told: features, tokens, choices, answers; 64 hex characters."""
        told = hashlib.sha256(repr((self._ends, self._prompts, self._options, self._answers)).encode())
        told.update(self._features.contiguous().numpy().tobytes())
        return told.hexdigest()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first = self._ends[index - 1] if index else 0
        return {
            "features": self._features[first : self._ends[index]],
            "input_ids": torch.tensor(self._prompts[index]),
            "option_ids": torch.tensor(self._options[index]),
            "answer": torch.tensor(self._answers[index]),
        }


def _first_tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        return option_ids(tokenizer, example.choices)
    except ValueError as error:
        raise ValueError(f"{example.id} cannot be scored by first tokens: {error}") from error


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [rows, longest], int64, of rows of different length.

    Example:
        >>> ids, mask = left_padded([[5], [6, 7]])
        >>> ids.tolist(), mask.tolist()
        ([[0, 5], [6, 7]], [[0, 1], [1, 1]])
    """
    length = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = torch.as_tensor(row)
        mask[index, length - len(row) :] = 1
    return ids, mask


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pad items of a `TaskDataset` to one batch: the whole sequences on the left, features and options on the right.

    Example:
        >>> item = {"features": torch.ones(1, 2), "option_ids": torch.tensor([5]), "answer": torch.tensor(0)}
        >>> long, short = torch.tensor([IMAGE_ID, 7]), torch.tensor([9])
        >>> batch = collate([item | {"input_ids": long}, item | {"input_ids": short}])
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
        ([[-1, 7], [0, 9]], [[1, 1], [0, 1]])
    """
    ids, mask = left_padded([item["input_ids"].tolist() for item in items])
    num_options = max(len(item["option_ids"]) for item in items)
    num_features = max(len(item["features"]) for item in items)
    width = items[0]["features"].shape[1]
    batch = {
        "features": torch.zeros(len(items), num_features, width, dtype=items[0]["features"].dtype),
        "input_ids": ids,
        "attention_mask": mask,
        "option_ids": torch.full((len(items), num_options), -1),
        "answer": torch.stack([item["answer"] for item in items]),
    }
    for row, item in enumerate(items):
        batch["features"][row, : len(item["features"])] = item["features"]
        batch["option_ids"][row, : len(item["option_ids"])] = item["option_ids"]
    return batch


@final
class TaskData(L.LightningDataModule):
    """One task for one language model.

    The order of training examples is drawn from the global torch generator, which Lightning seeds and checkpoints.

    Args:
        task: train, val and test examples.
        tokenizer: of the language model that will answer.
        store: where the pictures' features come from; read when the data module is made.
        batch_size: examples per training step; evaluation takes four times as many.
    """

    def __init__(
        self, task: Task, tokenizer: PreTrainedTokenizerBase, store: FeatureStore, *, batch_size: int = 8
    ) -> None:
        super().__init__()
        self.task = task
        self.batch_size = batch_size
        self.train_set = TaskDataset(task.train, tokenizer, store)
        self.val_set = TaskDataset(task.val, tokenizer, store)
        self.test_set = TaskDataset(task.test, tokenizer, store)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Shuffled batches; the last, smaller one is kept."""
        return DataLoader(self.train_set, self.batch_size, shuffle=True, collate_fn=collate)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches in order."""
        return DataLoader(self.val_set, 4 * self.batch_size, collate_fn=collate)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches in order."""
        return DataLoader(self.test_set, 4 * self.batch_size, collate_fn=collate)
