"""Properties of `lightning_pfl.functional.colora` for any numbers: merging, and what P and Q can reach."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_pfl.functional.colora import (
    colora_delta,
    colora_weight,
    gated_colora_delta,
    gated_lora_delta,
    lora_weight,
)
from lightning_pfl.functional.patches import Patches

sizes = st.integers(1, 6)
seeds = st.integers(0, 2**31)


def drawn(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@settings(max_examples=50, deadline=None)
@given(seed=seeds, rank=sizes, inputs=sizes, outputs=sizes, scale=st.floats(0.01, 100))
def test_merged_is_unmerged_for_a_P_that_is_not_symmetric_and_a_Q_that_is_not_zero(seed, rank, inputs, outputs, scale):
    draw = drawn(seed)
    x, A, B, P, Q, W = draw(4, inputs), draw(rank, inputs), draw(outputs, rank), draw(rank, rank), draw(rank), None
    W, b = draw(outputs, inputs), draw(outputs)
    assume(rank == 1 or not torch.allclose(P, P.T))

    weight, bias = colora_weight(A, B, P, Q, scale=scale)

    unmerged = F.linear(x, W, b) + colora_delta(x, A, B, P, Q, scale=scale)
    torch.testing.assert_close(F.linear(x, W + weight, b + bias), unmerged, atol=1e-11 * (1 + scale), rtol=1e-10)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, rank=sizes, kernel=st.integers(1, 3), padding=st.integers(0, 2), stride=st.integers(1, 2))
def test_merged_is_unmerged_for_convolutions_up_to_their_borders(seed, rank, kernel, padding, stride):
    """Q is a constant at every position, also where the kernel reads padding: one bias holds it."""
    draw = drawn(seed)
    x, W, b = draw(2, 3, 5, 6), draw(4, 3, kernel, kernel), draw(4)
    A, B, P, Q = draw(rank, 3 * kernel**2), draw(4, rank), draw(rank, rank), draw(rank)
    patches = Patches((kernel,) * 2, (stride,) * 2, ((padding, padding),) * 2, (1, 1))

    weight, bias = colora_weight(A, B, P, Q, scale=0.5)

    how = {"stride": stride, "padding": padding}
    unmerged = F.conv2d(x, W, b, **how) + colora_delta(x, A, B, P, Q, scale=0.5, patches=patches)
    torch.testing.assert_close(F.conv2d(x, W + weight.view_as(W), b + bias, **how), unmerged)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, rank=sizes, beta=st.floats(0, 1))
def test_two_branches_and_a_gate_merge_as_the_mixture_of_their_weights(seed, rank, beta):
    draw, g = drawn(seed), torch.tensor(beta, dtype=torch.float64)
    x, A, B = draw(4, 5), draw(rank, 5), draw(3, rank)
    G, L = (draw(rank, rank), draw(rank)), (draw(rank, rank), draw(rank))
    lora_G, lora_L = (draw(rank, 5), draw(3, rank)), (draw(rank, 5), draw(3, rank))

    (weight_G, bias_G), (weight_L, bias_L) = (colora_weight(A, B, *branch, scale=2.0) for branch in (G, L))
    mixed = F.linear(x, beta * weight_G + (1 - beta) * weight_L, beta * bias_G + (1 - beta) * bias_L)
    torch.testing.assert_close(gated_colora_delta(x, A, B, G, L, g, 1 - g, scale=2.0), mixed)

    weight = beta * lora_weight(*lora_G, scale=2.0) + (1 - beta) * lora_weight(*lora_L, scale=2.0)
    torch.testing.assert_close(gated_lora_delta(x, lora_G, lora_L, g, 1 - g, scale=2.0), F.linear(x, weight))


def reachable(A: Tensor, B: Tensor) -> int:
    """Dimension of the weights that P can reach: the rank of the map from P to B P A."""
    rank = A.shape[0]
    units = torch.eye(rank**2, dtype=A.dtype).reshape(-1, rank, rank)
    none = torch.zeros(rank, dtype=A.dtype)
    images = torch.stack([colora_weight(A, B, P, none, scale=1.0)[0].flatten() for P in units])
    return int(torch.linalg.matrix_rank(images))


@settings(max_examples=30, deadline=None)
@given(seed=seeds, rank=st.integers(1, 4), stretch=st.floats(0.1, 10))
def test_frozen_bases_of_full_rank_reach_a_space_of_rank_squared_dimensions(seed, rank, stretch):
    """Theorem 1 of arXiv:2506.11024. Full rank is enough: these rows are neither orthogonal nor of one length."""
    draw = drawn(seed)
    A, B = draw(rank, 6), draw(5, rank)
    A[0] *= stretch
    assume(torch.linalg.cond(A) < 1e4)
    assume(torch.linalg.cond(B) < 1e4)

    assert reachable(A, B) == rank**2
    if rank > 1:  # and it is needed: with a row that repeats another, the space shrinks
        A[-1] = A[0]
        assert reachable(A, B) == rank * (rank - 1)
