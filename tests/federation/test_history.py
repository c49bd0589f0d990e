"""Promises of `lightning_pfl.federation.history`."""

import math

import pytest
import torch

from lightning_pfl.federation.history import RelevanceRecord


def evenness(weights):
    names = tuple(str(index) for index in range(len(weights)))
    return RelevanceRecord(0, names, weights, None).summary().get("relevance/evenness")


def test_evenness_is_the_mean_entropy_of_what_a_row_gives_to_others():
    """Row 0 gives the others 1/4 and 3/4 of what it gives them, rows 1 and 2 all to one; log 2 is the most."""
    weights = torch.tensor([[0.2, 0.2, 0.6], [1.0, 0.0, 0.0], [0.5, 0.0, 0.5]])
    first = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))

    assert evenness(weights) == pytest.approx(first / math.log(2) / 3, abs=1e-6)


def test_rows_that_are_one_in_memory_say_the_same_as_a_matrix():
    row = torch.tensor([0.1, 0.0, 0.4, 0.5])

    assert evenness(row.expand(4, -1)) == evenness(row.repeat(4, 1))
    assert evenness(row.expand(4, -1)) is not None


def test_a_client_that_weighs_nobody_else_is_left_out():
    """Alone in its round a client has all the weight: its own row says nothing of others, the others' are certain."""
    assert evenness(torch.tensor([1.0, 0.0, 0.0]).expand(3, -1)) == 0.0
    assert evenness(torch.eye(3)) is None
