"""Promises of `lightning_pfl.functional.similarity`."""

import pytest
import torch

from lightning_pfl.functional.similarity import ColumnCosine, Cosine, cosine_matrix


def test_cosines_of_sketches_do_not_depend_on_their_length():
    """A client with ten times the loss has a sketch ten times as long, of the same task."""
    sketches = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    scaled = sketches * torch.tensor([1.0, 10.0, 0.1, 3.0, 1e-6])[:, None]

    torch.testing.assert_close(cosine_matrix(scaled), cosine_matrix(sketches))


def test_cosines_are_symmetric_to_the_last_bit_with_ones_on_the_diagonal():
    """Who compares two clients must not care who comes first."""
    cosines = cosine_matrix(torch.randn(7, 33, generator=torch.Generator().manual_seed(1)))

    assert torch.equal(cosines, cosines.T)
    assert torch.equal(cosines.diagonal(), torch.ones(7))


def test_cosines_by_column_give_each_column_equal_weight():
    """Rows read as 2 x 2 matrices: column 0 agrees (cosine 1), column 1 is orthogonal (0), so the mean is 1/2."""
    one = torch.tensor([[100.0, 1.0], [0.0, 0.0]])
    two = torch.tensor([[1.0, 0.0], [0.0, 1.0]])

    cosines = cosine_matrix(torch.stack([one.flatten(), two.flatten()]), columns=2)

    torch.testing.assert_close(cosines[0, 1], torch.tensor(0.5))


def test_a_sketch_of_zeros_is_like_nothing():
    """No division by zero: cosine 0 with the others."""
    cosines = cosine_matrix(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))

    torch.testing.assert_close(cosines, torch.eye(2))


def test_column_cosines_are_the_mean_of_what_a_loop_over_columns_gives():
    """The reference code's loop, in float64, against one product in float32."""
    sketches = torch.randn(6, 40 * 7, generator=torch.Generator().manual_seed(2)).double()
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for column in range(7):
        each = sketches.reshape(6, 40, 7)[:, :, column]
        unit = each / each.norm(dim=1, keepdim=True)
        expected += unit @ unit.T / 7

    torch.testing.assert_close(ColumnCosine(7).matrix(sketches.float()).double(), expected, atol=1e-6, rtol=0)


def test_one_column_is_the_plain_cosine():
    """To the bit."""
    sketches = torch.randn(5, 30, generator=torch.Generator().manual_seed(3))

    assert torch.equal(ColumnCosine(1).matrix(sketches), Cosine().matrix(sketches))


def test_low_precision_sketches_are_compared_in_float32():
    """The reference code compares in bfloat16, whose cosines are off in the third digit."""
    sketches = torch.randn(4, 2048, generator=torch.Generator().manual_seed(4)).bfloat16()

    cosines = Cosine().matrix(sketches)

    assert cosines.dtype == torch.float32
    unit = torch.nn.functional.normalize(sketches.double(), dim=1)
    torch.testing.assert_close(cosines.double(), unit @ unit.T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("columns", [0, -2])
def test_a_number_of_columns_that_is_none_is_refused(columns):
    """At construction, not in round 3."""
    with pytest.raises(ValueError, match="columns"):
        ColumnCosine(columns)


def test_sketches_that_do_not_form_so_many_columns_are_refused():
    """10 numbers are no rows of 3."""
    with pytest.raises(ValueError, match="3 columns"):
        ColumnCosine(3).matrix(torch.ones(2, 10))
