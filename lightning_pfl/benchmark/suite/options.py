"""Whether a tokenizer can tell the options of every question apart by their first tokens, as scoring by rows needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_pfl.benchmark.tasks import Task, option_ids
from lightning_pfl.benchmark.weights import GEMMA3_270M, SMOLLM2_135M, language_model_folder, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizers_at_hand(*, cache: Path | None = None) -> dict[str, PreTrainedTokenizerBase]:
    """Tokenizers of the packaged language models that were fetched and converted before; nothing is downloaded."""
    folders = {name: language_model_folder(name, cache=cache) for name in (SMOLLM2_135M, GEMMA3_270M)}
    return {name: load_tokenizer(str(folder)) for name, folder in folders.items() if folder.is_dir()}


def check_options(task: Task, tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> None:
    """Refuse a task with options that begin with the same token.

    Raises:
        ValueError: names the task, the model and the two options.
    """
    offered = {example.choices for examples in (task.train, task.val, task.test) for example in examples}
    for name, tokenizer in tokenizers.items():
        for choices in sorted(offered):
            try:
                option_ids(tokenizer, choices)
            except ValueError as error:
                raise ValueError(f"{task.name} does not suit {name}: {error}") from error
