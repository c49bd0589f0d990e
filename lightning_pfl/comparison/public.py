"""Public pictures as questions: which word of its caption comes after it?

Distillation between families of language models needs predictions that mean the same in each. Words that are one token
in every vocabulary give them; a picture's right answer is the first of them that its caption has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_pfl.benchmark.public import QUESTIONS, Caption
from lightning_pfl.benchmark.tasks import Example

__all__ = ["public_examples"]


def public_examples(captions: Sequence[Caption], tokenizers: Mapping[str, Any], count: int) -> tuple[Example, ...]:
    """The first captions that have a word of every vocabulary, as questions with all these words to choose from.

    Args:
        captions: named pictures, of no task.
        tokenizers: by key of a model.
        count: how many.

    Raises:
        ValueError: fewer than that.
    """
    known: dict[str, bool] = {}
    chosen: list[tuple[Caption, str]] = []
    for caption in captions:
        for word in caption.name.split():
            if word not in known:
                known[word] = all(_is_one_token(tokenizer, word) for tokenizer in tokenizers.values())
            if known[word]:
                chosen.append((caption, word))
                break
        if len(chosen) == count:
            break
    if len(chosen) < count:
        raise ValueError(f"{count} public pictures are wanted, but only {len(chosen)} have a word of every vocabulary.")
    words = tuple(sorted({word for _, word in chosen}))
    return tuple(
        Example(f"public/{index}", (caption.view,), QUESTIONS[index % len(QUESTIONS)], word, words)
        for index, (caption, word) in enumerate(chosen)
    )


def _is_one_token(tokenizer: Any, word: str) -> bool:
    ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id
