"""Losses of a student, by hand, and answers that models of all families can be taught."""

from math import log

import pytest
import torch

from lightning_pfl.functional.distillation import FLOOR, candidate_log_probs, divergence, soft_cross_entropy


def test_divergence_is_that_of_softened_probabilities_times_the_square_of_the_temperature():
    """At T = 2 logits 0 and 2 log 3 are 1 : 3, and 0 and 0 are 1 : 1."""
    student, teacher = torch.zeros(2, 2, requires_grad=True), torch.tensor([[0.0, 2 * log(3)], [0.0, 0.0]])

    value = divergence(student, teacher, 2.0)
    value.backward()

    apart = 0.25 * log(0.25 / 0.5) + 0.75 * log(0.75 / 0.5)
    assert value.item() == pytest.approx(4 * apart / 2)  # the mean over two rows, one of which agrees
    assert student.grad[0].tolist() == pytest.approx([2 * 0.25 / 2, -2 * 0.25 / 2])  # T (student - teacher) / n


def test_soft_cross_entropy_counts_every_class_by_the_teachers_probability():
    student, teacher = torch.tensor([[0.0, log(3)]]), torch.tensor([[0.0, 0.0]])

    assert soft_cross_entropy(student, teacher).tolist() == pytest.approx([-0.5 * log(0.25) - 0.5 * log(0.75)])


def test_answers_of_two_families_differ_by_no_constant_and_by_no_width():
    """One family's log-likelihoods are 5 nats lower throughout, and its batch offers one answer less."""
    one = candidate_log_probs(torch.tensor([[0.0, log(3), -torch.inf]]), 4)
    other = candidate_log_probs(torch.tensor([[-5.0, log(3) - 5.0]]), 4)

    torch.testing.assert_close(one, other)
    assert one[0, :2].exp().tolist() == pytest.approx([0.25, 0.75])
    assert one[0, 2:].tolist() == [FLOOR, FLOOR]


@pytest.mark.parametrize("temperature", [1.0, 3.0, 20.0])
def test_answers_that_are_not_offered_change_neither_loss_nor_gradient(temperature):
    scores = torch.tensor([[0.3, -0.2]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0]])

    wide = divergence(candidate_log_probs(scores, 6), candidate_log_probs(teacher, 6), temperature)
    (gradient,) = torch.autograd.grad(wide, scores)
    narrow = divergence(scores, teacher, temperature)
    (expected,) = torch.autograd.grad(narrow, scores)

    assert wide.item() == pytest.approx(narrow.item(), abs=1e-6)
    torch.testing.assert_close(gradient, expected)
    assert torch.tensor(FLOOR / 90).exp().item() == 0.0


def test_more_answers_than_the_width_are_refused():
    with pytest.raises(ValueError, match="at most `width` = 2 answers, but some offer 3"):
        candidate_log_probs(torch.zeros(1, 3), 2)
