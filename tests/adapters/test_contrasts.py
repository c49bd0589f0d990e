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


def test_more_pairs_begin_with_the_first_and_differ():
    words = {"a": torch.arange(50)}
    pairs = draw_contrast(words, 7, num_pairs=5)["a"]
    assert pairs.shape == (5, 2)
    assert torch.equal(pairs[:1], draw_contrast(words, 7)["a"])
    assert len({tuple(pair) for pair in pairs.tolist()}) == 5


class Scores(nn.Module):
    """Row 0 has scores 0, 1, 4, 9 at position 0, 16 ... 49 at position 1, and so on."""

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=torch.arange(24.0).view(2, 3, 4) ** 2)


class Sparing(Scores):
    def forward(self, input_ids, attention_mask, logits_to_keep):
        self.computed = logits_to_keep.tolist()
        return SimpleNamespace(logits=super().forward(input_ids, attention_mask).logits[:, logits_to_keep])


@pytest.mark.parametrize("kind", [Scores, Sparing])
def test_the_loss_is_the_difference_of_two_scores_behind_every_asked_position(kind):
    inputs = {
        "input_ids": torch.zeros(2, 3, dtype=torch.int64),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "asked": torch.tensor([[0, 0], [1, 2]]),
        "contrast": torch.tensor([[3, 0], [1, 2]]),
    }
    model = kind()

    # by hand: row 0 at position 0 has 9 and 0; row 1 at position 2 has 441 and 484
    assert contrast_loss(model, inputs) == (9 - 0) + (441 - 484)
    if kind is Sparing:
        assert model.computed == [0, 2], "position 1 is not asked about"
