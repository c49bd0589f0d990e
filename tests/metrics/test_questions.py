"""Metrics over questions, by hand."""

import math
import pickle

import pytest
import torch

from lightning_pfl.metrics import ChoiceScores, GeneratedChoices, OpenAnswers


def logs(*rows):
    return torch.tensor(rows).log()


def test_accuracy_and_likelihood_by_hand():
    """Right, wrong, right: 2/3; mean of ln .5, ln .2 and ln(.6 / .9), the last over two offered candidates only."""
    scores = ChoiceScores()
    scores.update(logs([0.5, 0.3, 0.2], [0.2, 0.7, 0.1]), torch.tensor([0, 0]))
    scores.update(logs([0.3, 0.6, 0.0]), torch.tensor([1]))
    result = scores.compute()

    torch.testing.assert_close(result["accuracy"], torch.tensor(2 / 3))
    expected = (math.log(0.5) + math.log(0.2) + math.log(0.6 / 0.9)) / 3
    torch.testing.assert_close(result["log_likelihood"], torch.tensor(expected))
    assert result["num_examples"] == 3


def test_a_model_that_prefers_nothing_scores_chance():
    """Not the share of questions whose first choice is right."""
    scores = ChoiceScores()
    scores.update(torch.zeros(3, 4), torch.tensor([0, 0, 0]))
    scores.update(logs([0.4, 0.4, 0.2]), torch.tensor([1]))

    torch.testing.assert_close(scores.compute()["accuracy"], torch.tensor((3 / 4 + 1 / 2) / 4))


def test_dividing_by_lengths_is_asked_for():
    """-4 over 4 tokens beats -2 over 1."""
    likelihoods, answer = torch.tensor([[-2.0, -4.0]]), torch.tensor([1])
    plain, scaled = ChoiceScores(), ChoiceScores()
    plain.update(likelihoods, answer)
    scaled.update(likelihoods, answer, lengths=torch.tensor([[1, 4]]))

    assert (plain.compute()["accuracy"], scaled.compute()["accuracy"]) == (0.0, 1.0)


def test_likelihoods_that_cannot_be_scored_are_refused():
    scores = ChoiceScores()
    with pytest.raises(ValueError, match="row 0 candidate 1 has no likelihood"):
        scores.update(torch.tensor([[0.0, -math.inf]]), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3,\)"):
        scores.update(torch.zeros(2, 3), torch.tensor([0, 0, 0]))
    assert scores.num_examples == 0


def test_unreadable_answers_count_as_wrong_and_show():
    """red right, green wrong, two named, none named."""
    scores = GeneratedChoices()
    offered = [["red", "green"]] * 4
    scores.update(["red", "Green.", "red or green", "hm"], offered, ["red", "red", "red", "green"])

    assert scores.compute() == {"accuracy": 0.25, "unread": 0.5, "num_examples": 4}
    with pytest.raises(ValueError, match=r"\['red', 'green'\], but is 'blue'"):
        scores.update(["red"], offered[:1], ["blue"])


def test_open_answers_by_hand():
    """1, 2/3 and 0."""
    scores = OpenAnswers(special_tokens=["<s>"])
    scores.update(["<s>five", "red hat", "7"], ["five", "hat", "<s>8"])
    result = scores.compute()

    torch.testing.assert_close(result["f1"], torch.tensor(5 / 9))
    torch.testing.assert_close(result["exact"], torch.tensor(1 / 3))


@pytest.mark.parametrize("metric", [ChoiceScores, GeneratedChoices, OpenAnswers])
def test_nothing_scores_nan_and_reset_forgets(metric):
    scores = metric()
    if metric is ChoiceScores:
        scores.update(torch.zeros(0, 3), torch.zeros(0).long())
    else:
        scores.update([], *([[]] * (1 if metric is OpenAnswers else 2)))
    assert scores.compute()["num_examples"] == 0
    assert math.isnan(scores.compute()[scores.names[0]])


def test_states_travel_and_add_up():
    """What torchmetrics promises: pickling, resetting, summing over processes."""
    scores = ChoiceScores()
    scores.update(logs([0.9, 0.1]), torch.tensor([0]))
    copy = pickle.loads(pickle.dumps(scores))
    copy.update(logs([0.9, 0.1]), torch.tensor([1]))
    assert copy.compute()["accuracy"] == 0.5

    copy.reset()
    copy.update(logs([0.9, 0.1]), torch.tensor([1]))
    assert copy.compute()["accuracy"] == 0.0

    both = ChoiceScores()
    both.update(logs([0.9, 0.1]), torch.tensor([1]))
    both.merge_state(scores)
    assert both.compute()["accuracy"] == 0.5
    assert both.compute()["num_examples"] == 2
