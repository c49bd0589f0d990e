"""Likelihood of continuations, by hand on tiny tables of probabilities."""

import math

import pytest
import torch

from lightning_pfl.functional.likelihood import choice_log_probs, continuation_log_likelihood


def test_the_likelihood_is_the_product_over_the_chosen_tokens():
    """Position t predicts token t + 1; the last position and the prompt's tokens do not count."""
    probabilities = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.25, 0.25], [0.0, 0.0, 1.0]]])
    ids = torch.tensor([[0, 1, 2, 0]])

    found = continuation_log_likelihood(probabilities.log(), ids, torch.tensor([[False, False, True, True]]))

    # p(2 | position 1) * p(0 | position 2)
    torch.testing.assert_close(found.exp(), torch.tensor([0.3 * 0.5]))


def test_rows_are_summed_apart_and_an_empty_continuation_is_certain():
    logits = torch.zeros(3, 3, 4)
    chosen = torch.tensor([[False, True, True], [False, False, False], [False, False, True]])

    found = continuation_log_likelihood(logits, torch.zeros(3, 3, dtype=torch.long), chosen)

    torch.testing.assert_close(found, torch.tensor([-2 * math.log(4), 0.0, -math.log(4)]))


def test_bfloat16_logits_are_normalised_in_float32():
    logits = torch.zeros(1, 2, 4096, dtype=torch.bfloat16)

    found = continuation_log_likelihood(logits, torch.zeros(1, 2, dtype=torch.long), torch.tensor([[False, True]]))

    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([-math.log(4096)]))


def test_an_unpredictable_first_token_and_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="no position predicts it"):
        continuation_log_likelihood(torch.zeros(1, 2, 3), torch.zeros(1, 2).long(), torch.tensor([[True, True]]))
    with pytest.raises(ValueError, match=r"\(1, 2, 3\), \(1, 3\) and \(1, 3\)"):
        continuation_log_likelihood(torch.zeros(1, 2, 3), torch.zeros(1, 3).long(), torch.zeros(1, 3).bool())


def test_shares_among_candidates_with_and_without_lengths():
    """exp(-2) : exp(-3) as they are; -2 : -1 per token."""
    scores = torch.tensor([[-2.0, -3.0, -math.inf]])

    plain = choice_log_probs(scores)
    scaled = choice_log_probs(scores, torch.tensor([[1, 3, 0]]))

    torch.testing.assert_close(plain.exp(), torch.tensor([[1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0.0]]))
    torch.testing.assert_close(scaled.exp(), torch.tensor([[1 / (1 + math.e), 1 / (1 + math.exp(-1)), 0.0]]))


@pytest.mark.parametrize("row", [[math.nan, 0.0], [-math.inf, -math.inf]])
def test_a_question_without_a_usable_likelihood_is_refused_by_row(row):
    with pytest.raises(ValueError, match="row 1 has"):
        choice_log_probs(torch.tensor([[0.0, 0.0], row]))


def test_a_candidate_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        choice_log_probs(torch.zeros(1, 2), torch.tensor([[1, 0]]))
