"""Promises of `lightning_pfl.functional.colora`, against the formulas written out with plain matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pfl.functional.colora import (
    colora_delta,
    colora_weight,
    gated_colora_delta,
    gated_lora_delta,
    kaiming_rows,
    lora_delta,
    lora_weight,
    orthonormal_bases,
    seed_from,
    stack_lora,
)

R, IN, OUT, BATCH, LENGTH = 3, 5, 4, 2, 6


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_a_colora_branch_is_the_formula_in_column_convention(draw):
    """For one column x: s B (P (A x) + Q), each product written as matrix times column."""
    x, A, B, P, Q = draw(IN), draw(R, IN), draw(OUT, R), draw(R, R), draw(R)

    expected = 2.0 * (B @ (P @ (A @ x) + Q))

    torch.testing.assert_close(colora_delta(x, A, B, P, Q, scale=2.0), expected)


def test_one_weight_for_all_inputs_mixes_the_two_branches(draw):
    x, A, B = draw(BATCH, LENGTH, IN), draw(R, IN), draw(OUT, R)
    G, L = (draw(R, R), draw(R)), (draw(R, R), draw(R))
    g, l = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)  # noqa: E741

    expected = 0.3 * colora_delta(x, A, B, *G, scale=1.5) + 0.9 * colora_delta(x, A, B, *L, scale=1.5)

    torch.testing.assert_close(gated_colora_delta(x, A, B, G, L, g, l, scale=1.5), expected)


@pytest.mark.parametrize("middle", [(), (LENGTH,), (2, 3)], ids=["vectors", "sequences", "images"])
def test_one_weight_per_sample_weighs_each_sample_by_itself(draw, middle):
    x, A, B = draw(BATCH, *middle, IN), draw(R, IN), draw(OUT, R)
    G, L = (draw(R, R), draw(R)), (draw(R, R), draw(R))
    A_G, B_G, A_L, B_L = draw(R, IN), draw(OUT, R), draw(R, IN), draw(OUT, R)
    g = torch.tensor([0.2, 0.7], dtype=torch.float64)

    pq = gated_colora_delta(x, A, B, G, L, g, 1 - g, scale=1.5)
    ab = gated_lora_delta(x, (A_G, B_G), (A_L, B_L), g, 1 - g, scale=1.5)

    for i, b in enumerate((0.2, 0.7)):
        colora = b * colora_delta(x[i], A, B, *G, scale=1.5) + (1 - b) * colora_delta(x[i], A, B, *L, scale=1.5)
        lora = b * lora_delta(x[i], A_G, B_G, scale=1.5) + (1 - b) * lora_delta(x[i], A_L, B_L, scale=1.5)
        torch.testing.assert_close(pq[i], colora)
        torch.testing.assert_close(ab[i], lora)


def test_two_conventional_branches_are_one_lora_of_twice_the_rank(draw):
    x = draw(BATCH, IN)
    G, L = (draw(R, IN), draw(OUT, R)), (draw(R, IN), draw(OUT, R))
    g, l = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)  # noqa: E741

    A, B = stack_lora(G, L, g, l)

    assert A.shape == (2 * R, IN)
    expected = 0.3 * lora_delta(x, *G, scale=2.0) + 0.9 * lora_delta(x, *L, scale=2.0)
    torch.testing.assert_close(lora_delta(x, A, B, scale=2.0), expected)
    torch.testing.assert_close(gated_lora_delta(x, G, L, g, l, scale=2.0), expected)


def test_the_merged_weight_and_bias_do_what_the_branch_does(draw):
    x, A, B, P, Q = draw(BATCH, IN), draw(R, IN), draw(OUT, R), draw(R, R), draw(R)

    weight, bias = colora_weight(A, B, P, Q, scale=0.5)

    torch.testing.assert_close(x @ weight.T + bias, colora_delta(x, A, B, P, Q, scale=0.5))
    torch.testing.assert_close(x @ lora_weight(A, B, scale=0.5).T, lora_delta(x, A, B, scale=0.5))


def test_a_gate_per_sample_makes_no_matrix_per_sample(draw):
    """No tensor that the graph keeps has the shape [batch, r, r]: the rank-r vectors are mixed."""
    kept: list[torch.Size] = []
    x, A, B = draw(7, LENGTH, IN), draw(R, IN), draw(OUT, R)
    P, Q = draw(R, R).requires_grad_(), draw(R).requires_grad_()

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        gated_colora_delta(x, A, B, (P, Q), (P, Q), torch.full((7,), 0.5, dtype=torch.float64).requires_grad_(),
                           torch.full((7,), 0.5, dtype=torch.float64), scale=1.0)  # fmt: skip

    assert kept
    assert (7, R, R) not in [tuple(shape) for shape in kept]


def test_bases_are_orthonormal_and_come_from_the_seed_alone():
    A, B = orthonormal_bases(16, 300, 200, seed=7)

    torch.testing.assert_close(A @ A.T, torch.eye(16), atol=1e-6, rtol=0)
    torch.testing.assert_close(B.T @ B, torch.eye(16), atol=1e-6, rtol=0)
    assert torch.equal(A, orthonormal_bases(16, 300, 200, seed=7)[0])
    assert not torch.equal(A, orthonormal_bases(16, 300, 200, seed=8)[0])


def test_bases_are_factorised_in_one_thread_whatever_torch_uses(monkeypatch):
    """Two threads change the last bits of a factorisation (seen from 2048 x 64 on), and clients differ in threads."""
    used: list[int] = []
    qr, threads = torch.linalg.qr, torch.get_num_threads()
    monkeypatch.setattr(torch.linalg, "qr", lambda m: used.append(torch.get_num_threads()) or qr(m))
    try:
        torch.set_num_threads(2)
        orthonormal_bases(2, 4, 4, seed=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)

    assert used == [1, 1]


def test_drawing_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)

    orthonormal_bases(2, 4, 4, seed=1)
    kaiming_rows(2, 4, seed=1)

    assert torch.equal(torch.rand(3), expected)


def test_a_rank_larger_than_the_layer_is_refused():
    with pytest.raises(ValueError, match="rank 5 need widths of at least 5, but the layer maps 8 to 4"):
        orthonormal_bases(5, 8, 4, seed=0)


def test_a_seed_depends_on_every_part_and_on_nothing_of_the_process():
    # the first eight bytes of the SHA-256 of "(0, 'llama', 'main', 1, 'q')", halved
    assert seed_from(0, "llama", "main", 1, "q") == 7492655872080730477
    parts = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a", "1")]
    assert len({seed_from(*p) for p in parts}) == len(parts)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(4, 7), st.integers(4, 7), st.integers(0, 2**31))
def test_reachable_updates_have_dimension_r_squared_whenever_a_and_b_have_full_rank(rank, d_in, d_out, seed):
    """Theorem 1 of the paper, which asks for orthonormal A and B; full rank is enough, and needed.

    The r * r updates B P A of the unit matrices P span what training can reach; Q reaches r more, in the bias.
    """
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, dtype=torch.float64, generator=generator)
    B = torch.randn(d_out, rank, dtype=torch.float64, generator=generator)
    units = torch.eye(rank * rank, dtype=torch.float64).reshape(-1, rank, rank)

    def dimension(A, B):
        found = [colora_weight(A, B, P, torch.zeros(rank, dtype=torch.float64), scale=2.0)[0] for P in units]
        return int(torch.linalg.matrix_rank(torch.stack(found).flatten(1), rtol=1e-9))

    assert dimension(A, B) == rank**2
    biases = [colora_weight(A, B, units[0], Q, scale=2.0)[1] for Q in torch.eye(rank, dtype=torch.float64)]
    assert torch.linalg.matrix_rank(torch.stack(biases), rtol=1e-9) == rank
    A[-1] = 0.5 * A[0] if rank > 1 else 0  # one row lost: r columns of P have no effect of their own
    assert dimension(A, B) == rank * (rank - 1)
