"""What is missed under given bases, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_pfl.adapters.fidelity import Errors, Fidelity, table
from lightning_pfl.adapters.gathering import Seen

ONE = (torch.ones(1, 1), torch.ones(1, 1))


def seen(x, anchor_x, g, anchor_g):
    columns = [torch.tensor(values)[:, None] for values in (x, anchor_x, g, anchor_g)]
    return Seen(*columns, torch.arange(len(x)))


def test_errors_are_shares_of_what_the_anchor_does():
    """z 1, 4 against 2, 4; B'g 1, 1 against 1, 2; so P's gradient is 5 against 10, of another record 0 against 5."""
    fidelity = Fidelity(ONE, ONE)
    fidelity.add(seen([1.0, 4.0], [2.0, 4.0], [1.0, 1.0], [1.0, 2.0]))
    fidelity.add(seen([0.0], [3.0], [1.0], [5 / 3]))

    found = fidelity.errors()

    # z of the anchor is 2, 4, 3: it varies by 2 in all; missed are 1, 0 and 9
    assert found.missed_A == pytest.approx(10 / 2)
    assert found.missed_B == pytest.approx((0 + 1 + 4 / 9) / (1 + 4 + 25 / 9))
    assert found.missed_P == pytest.approx((25 + 25) / (100 + 25))
    assert found.agreement_P == pytest.approx(50 / math.sqrt(25 * 125))


def test_zero_bases_miss_everything_and_a_larger_scale_does_not_hurt_the_agreement():
    x = g = [1.0, -1.0, 2.0]
    nothing, larger = Fidelity((torch.zeros(1, 1), torch.zeros(1, 1)), ONE), Fidelity((3 * ONE[0], ONE[1]), ONE)
    for fidelity in (nothing, larger):
        fidelity.add(seen(x, x, g, g))
    assert nothing.errors().missed_B == nothing.errors().missed_P == 1
    assert nothing.errors().agreement_P == 0
    assert larger.errors().missed_P == pytest.approx(4)
    assert larger.errors().agreement_P == pytest.approx(1)


def test_an_anchor_that_does_nothing_cannot_be_followed():
    fidelity = Fidelity(ONE, (torch.zeros(1, 1), torch.zeros(1, 1)))
    fidelity.add(seen([1.0, 2.0], [1.0, 2.0], [1.0, 1.0], [1.0, 1.0]))
    assert fidelity.errors() == Errors(math.inf, math.inf, math.inf, 0.0)


def test_the_table_names_model_tower_block_and_role():
    lines = table({("big", "vision/1/q"): (Errors(2e5, 1, 1, 0), Errors(0.25, 0.5, 0.125, 0.9))}).splitlines()
    assert lines[2] == "| big | vision | 1 | q | 2.0e+05 → 0.25 | 1.00 → 0.50 | 1.00 → 0.12 | 0.00 → 0.90 |"
