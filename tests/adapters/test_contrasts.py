"""Promises of `lightning_pfl.adapters.contrasts`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_pfl.adapters.contrasts import contrast_loss, draw_contrast, shared_words


class Vocabulary:
    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}


def test_words_are_those_that_begin_a_token_in_every_vocabulary_in_one_order():
    words = shared_words(
        {
            "bpe": Vocabulary("Ġdog", "cat", "Ġcat", "Ġis", "ĠBig", "Ġbird", "Ġna\u00efve"),
            "piece": Vocabulary("▁bird", "▁is", "▁Big", "▁cat", "▁dog", "▁na\u00efve"),
        }
    )

    # bird, cat, dog; not `is` (two letters), `Big` (a capital), the one with an accent, or `cat` inside a word
    assert words["bpe"].tolist() == [5, 2, 0]
    assert words["piece"].tolist() == [0, 3, 4]


def test_vocabularies_without_two_common_words_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"there are 1 .*'a': 2, 'b': 1.*causal_lm_loss"):
        shared_words({"a": Vocabulary("Ġdog", "Ġcat"), "b": Vocabulary("▁dog")})


def test_a_text_gets_two_different_words_the_same_for_all_models_and_again():
    words = {"a": torch.arange(50), "b": 100 + torch.arange(50)}
    pairs = [draw_contrast(words, index) for index in range(30)]

    for index, pair in enumerate(pairs):
        assert pair["a"].shape == (1, 2)
        assert pair["a"][0, 0] != pair["a"][0, 1]
        assert torch.equal(pair["a"] + 100, pair["b"])
        assert torch.equal(pair["a"], draw_contrast(words, index)["a"])
    assert len({tuple(pair["a"][0].tolist()) for pair in pairs}) > 20


def test_the_loss_is_the_difference_of_two_scores_after_the_last_real_token():
    class Scores(nn.Module):
        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(logits=torch.arange(24.0).view(2, 3, 4) ** 2)

    inputs = {
        "input_ids": torch.zeros(2, 3, dtype=torch.int64),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "contrast": torch.tensor([[3, 0], [1, 2]]),
    }

    # by hand: row 0 ends at position 1, scores 16 .. 49; row 1 at position 2, scores 400 .. 529
    assert contrast_loss(Scores(), inputs) == (49 - 16) + (441 - 484)
