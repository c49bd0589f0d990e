"""Promises of `lightning_pfl.functional.patches`: a convolution is a matrix applied to patches, exactly."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_pfl.adapters.adaptable import patches_of

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolutions(draw) -> nn.Module:
    """A convolution of any geometry, and an input that is large enough for it."""
    dimensions = draw(st.integers(1, 3))
    each = {
        name: draw(st.tuples(*[st.integers(low, high)] * dimensions))
        for name, low, high in (("kernel_size", 1, 3), ("stride", 1, 2), ("padding", 0, 2), ("dilation", 1, 2))
    }
    if draw(st.booleans()):
        each["padding"], each["stride"] = "same", (1,) * dimensions
    mode = draw(st.sampled_from(["zeros", "replicate", "circular", "reflect"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    return _CONVOLUTIONS[dimensions](3, 2, **each, padding_mode=mode, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(convolutions())
def test_reading_patches_is_the_convolution_and_the_matrix_on_what_was_unfolded(layer):
    x = torch.randn(2, 3, *range(5, 5 + len(layer.kernel_size)), dtype=torch.float64)
    matrix, patches = layer.weight.flatten(1), patches_of(layer)

    expected = layer(x) - layer.bias.reshape(-1, *[1] * len(layer.kernel_size))

    torch.testing.assert_close(patches.read(x, matrix), expected)
    torch.testing.assert_close((patches.unfold(x) @ matrix.T).movedim(-1, 1), expected)


def test_a_map_is_the_matrix_at_every_position():
    patches = patches_of(nn.Conv2d(3, 2, 3, padding=1))
    z, matrix, shift = torch.randn(2, 4, 5, 6), torch.randn(3, 4), torch.randn(3)

    expected = torch.einsum("nm,bmhw->bnhw", matrix, z) + shift[:, None, None]

    torch.testing.assert_close(patches.map(z, matrix, shift), expected)
