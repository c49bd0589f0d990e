"""Promises of `lightning_pfl.functional.alignment`, the planted two-model test of transfer among them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_pfl.functional.alignment import (
    PairedSums,
    choose_ridge,
    fit_A,
    fit_B_from_gradients,
    rotate_B_by_cca,
    unexplained,
)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sums_of(x: Tensor, z: Tensor) -> PairedSums:
    sums = PairedSums(x.shape[1], z.shape[1])
    sums.add(x, z)
    return sums


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(randn(rows, columns, seed=seed))[0]


def test_sums_do_not_depend_on_how_tokens_are_cut_into_batches():
    x, z = randn(50, 6, seed=0), randn(50, 3, seed=1)
    whole, parts = sums_of(x, z), PairedSums(6, 3)

    for start in range(0, 50, 7):
        parts.add(x[start : start + 7], z[start : start + 7])

    assert parts.count == whole.count == 50
    for centred in (True, False):
        for part, product in zip(parts.products(centred=centred), whole.products(centred=centred), strict=True):
            torch.testing.assert_close(part, product, rtol=1e-10, atol=1e-10)


def test_centred_products_are_those_of_deviations_from_the_mean():
    x, z = 5 + randn(40, 4, seed=0), randn(40, 2, seed=1) - 3
    dx, dz = x - x.mean(0), z - z.mean(0)

    for product, expected in zip(sums_of(x, z).products(centred=True), (dx.T @ dx, dx.T @ dz, dz.T @ dz), strict=True):
        torch.testing.assert_close(product, expected)


def test_sums_survive_a_large_common_offset_in_bfloat16_inputs():
    """Transformers have channels with means of hundreds; sums in float32 would lose the deviations."""
    x = (1000 + randn(4096, 2, seed=0)).to(torch.bfloat16)
    dx = x.double() - x.double().mean(0)

    torch.testing.assert_close(sums_of(x, x).products(centred=True)[0], dx.T @ dx, rtol=1e-9, atol=1e-9)


def test_sums_refuse_tokens_that_do_not_match_or_are_not_finite():
    sums = PairedSums(3, 2)

    with pytest.raises(ValueError, match=r"same tokens.*\[4, 3\] and \[5, 2\]"):
        sums.add(torch.zeros(4, 3), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="not finite"):
        sums.add(torch.full((1, 3), torch.inf), torch.zeros(1, 2))


def test_A_is_the_least_squares_solution():
    x, z = 2 + randn(200, 6, seed=0), randn(200, 3, seed=1) + 4

    expected = torch.linalg.lstsq(x, z).solution.T
    torch.testing.assert_close(fit_A(sums_of(x, z), ridge=1e-12).A, expected, rtol=1e-6, atol=1e-8)


def test_unexplained_counts_a_wrong_mean_against_how_z_varies():
    """z = 10 +- 1 and an answer of 12 +- 1: the error is 4, z varies by 1, z itself is 101."""
    z = torch.tensor([[9.0], [11.0]]).double()
    sums = sums_of(torch.cat([z, torch.ones(2, 1)], 1), z)

    assert unexplained(torch.tensor([[1.0, 2.0]]), sums) == pytest.approx(4)
    assert unexplained(torch.tensor([[1.0, 2.0]]), sums, of_variation=False) == pytest.approx(4 / 101)


def test_A_factors_into_K_times_rows_that_are_orthonormal():
    projection = fit_A(sums_of(randn(200, 6, seed=0), randn(200, 3, seed=1)))

    A_o = projection.orthonormal
    torch.testing.assert_close(A_o @ A_o.T, torch.eye(3).double())
    torch.testing.assert_close(projection.K @ A_o, projection.A)
    torch.testing.assert_close(projection.K, projection.K.T)


def test_orthonormal_only_is_the_nearest_orthonormal_matrix_and_forgets_the_scale():
    """z = (3 x_0, 0.1 x_1): least squares keep 3 and 0.1, the paper's choice has 1 and 1."""
    x = randn(500, 4, seed=0)
    sums = sums_of(x, torch.stack([3 * x[:, 0], 0.1 * x[:, 1]], 1))

    exact, nearest = fit_A(sums).A, fit_A(sums, orthonormal_only=True).A

    torch.testing.assert_close(exact, torch.tensor([[3, 0, 0, 0], [0, 0.1, 0, 0]]).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(nearest, torch.eye(2, 4).double(), atol=1e-4, rtol=0)
    # by hand: missed 4 of 9 on the first coordinate and 0.81 of 0.01 on the second, together 4.81 of 9.01
    assert unexplained(nearest, sums) == pytest.approx(4.81 / 9.01, abs=0.05)
    assert unexplained(exact, sums) < 1e-9


def test_with_fewer_tokens_than_inputs_a_ridge_keeps_the_fit_useful_on_new_tokens():
    """56 tokens, 60 inputs that live in 5 directions plus noise: interpolation fits the noise."""
    directions, reading = randn(5, 60, seed=0), randn(5, 3, seed=1)

    def tokens(count: int, seed: int) -> PairedSums:
        latent = randn(count, 5, seed=seed)
        z = latent @ reading + 0.5 * randn(count, 3, seed=seed + 2)
        return sums_of(latent @ directions + randn(count, 60, seed=seed + 1), z)

    few, new = tokens(56, seed=2), tokens(2000, seed=10)

    assert unexplained(fit_A(few).A, new) < 0.5
    assert unexplained(fit_A(few, ridge=1e-9).A, new) > 1


def test_fewer_tokens_than_ranks_are_an_error():
    for fit in (fit_A, fit_B_from_gradients):
        with pytest.raises(ValueError, match=r"rank 8 needs at least 8 tokens.*there are 7"):
            fit(sums_of(randn(7, 20, seed=0), randn(7, 8, seed=1)))


def test_inputs_that_cannot_reach_the_rank_are_an_error():
    x = randn(100, 1, seed=0) * torch.ones(4).double()

    with pytest.raises(ValueError, match=r"must have rank 2.*gave it rank 1"):
        fit_A(sums_of(x, randn(100, 2, seed=1)))


def test_a_student_like_the_anchor_gets_the_anchors_bases():
    x, g = randn(300, 8, seed=0), randn(300, 6, seed=1)
    A, B = orthonormal(8, 3, seed=2).T, orthonormal(6, 3, seed=3)

    torch.testing.assert_close(fit_A(sums_of(x, x @ A.T)).A, A, atol=1e-4, rtol=0)
    torch.testing.assert_close(fit_B_from_gradients(sums_of(g, g @ B)), B, atol=1e-4, rtol=0)


def test_B_from_gradients_counts_constant_gradients():
    """g_0 is always 1 and z always 2: centred, g_0 would have nothing to say."""
    g = torch.stack([torch.ones(50).double(), randn(50, seed=0)], 1)

    B = fit_B_from_gradients(sums_of(g, torch.full((50, 1), 2.0)))

    torch.testing.assert_close(B, torch.tensor([[2.0], [0.0]]).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("gamma", [1e-4, 1e-2, 1.0])
def test_cca_in_rank_space_equals_the_papers_map_on_whole_outputs(gamma: float):
    """M_s B_a with M_s from d_out x d_out covariances, computed literally in float64."""
    T, rank = 200, 4
    x, z_anchor = 1 + randn(T, 10, seed=0), randn(T, rank, seed=1) - 2
    A = randn(rank, 10, seed=2)
    z_anchor = z_anchor + x @ randn(10, rank, seed=3)
    B, B_anchor = orthonormal(9, rank, seed=4), orthonormal(7, rank, seed=5)

    def power(matrix: Tensor, exponent: float) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values**exponent) @ vectors.T

    X1, X3 = z_anchor @ B_anchor.T, x @ A.T @ B.T
    X1, X3 = X1 - X1.mean(0), X3 - X3.mean(0)
    S11, S33 = X1.T @ X1 + gamma * torch.eye(7), X3.T @ X3 + gamma * torch.eye(9)
    U, _, Vh = torch.linalg.svd(power(S33, -0.5) @ (X3.T @ X1) @ power(S11, -0.5))
    U, Vh = U[:, :rank], Vh[:rank]  # the other singular values are zero; their vectors are arbitrary
    expected = power(S33, 0.5) @ U @ Vh @ power(S11, -0.5) @ B_anchor

    rotated = rotate_B_by_cca(B, A, sums_of(x, z_anchor), gamma=gamma)

    torch.testing.assert_close(rotated, expected, rtol=1e-6, atol=1e-7)
    # it never leaves the column space of the B it started from
    torch.testing.assert_close(B @ (B.T @ rotated), rotated)


def test_cca_refuses_a_B_without_orthonormal_columns():
    with pytest.raises(ValueError, match="orthonormal columns"):
        rotate_B_by_cca(2 * torch.eye(3, 2), torch.eye(2), sums_of(randn(9, 2, seed=0), randn(9, 2, seed=1)))


def test_choose_ridge_takes_the_one_that_does_best_on_held_out_tokens():
    """Noise-free targets want the smallest penalty; targets that are mostly noise want the largest."""
    x, noise = randn(60, 30, seed=0), randn(60, 2, seed=1)
    clean = x[:, :2]

    for z, best in ((clean, 1e-6), (0.05 * clean + noise, 10.0)):
        fit, held_out = sums_of(x[:40], z[:40]), sums_of(x[40:], z[40:])
        assert choose_ridge(fit, held_out, ridges=(1e-6, 1e-3, 10.0)) == best


def test_choose_ridge_and_unexplained_refuse_what_says_nothing():
    with pytest.raises(ValueError, match="held-out tokens, but there are 0"):
        choose_ridge(sums_of(randn(9, 2, seed=0), randn(9, 2, seed=1)), PairedSums(2, 2))
    with pytest.raises(ValueError, match="all the same"):
        unexplained(torch.eye(2), sums_of(randn(9, 2, seed=0), torch.ones(9, 2).double()))


@dataclass(frozen=True)
class Planted:
    """A linear model of a world with 6 hidden causes: x = mean + E s + noise, y = R (h + adapter), base output W x."""

    E: Tensor
    mean: Tensor
    R: Tensor
    A: Tensor
    B: Tensor

    @staticmethod
    def of(width_in: int, width_out: int, seed: int, *, causes: int = 6, outputs: int = 5, rank: int = 6) -> Planted:
        scale = torch.logspace(0, -1, width_in, dtype=torch.float64)[:, None]
        return Planted(
            E=scale * randn(width_in, causes, seed=seed),
            mean=2 * randn(width_in, seed=seed + 9),
            R=randn(outputs, width_out, seed=seed + 1) / width_out**0.5,
            A=orthonormal(width_in, rank, seed=seed + 2).T,
            B=orthonormal(width_out, rank, seed=seed + 3),
        )

    def x(self, s: Tensor, seed: int) -> Tensor:
        return self.mean + s @ self.E.T + 0.02 * randn(len(s), len(self.E), seed=seed)

    def gradient(self, error: Tensor) -> Tensor:
        """Of 1/2 |error|^2 with respect to the module's output h."""
        return error @ self.R

    def adapter(self, x: Tensor, A: Tensor, B: Tensor, P: Tensor) -> Tensor:
        return x @ A.T @ P.T @ B.T @ self.R.T


def centred(x: Tensor, z: Tensor) -> PairedSums:
    return sums_of(x - x.mean(0), z - z.mean(0))


def transfer_error(A: Tensor, B: Tensor, *, P: Tensor, student: Planted, s: Tensor, wanted: Tensor) -> float:
    """The student's squared error under the anchor's P; 1 is what zero output has."""
    output = student.adapter(student.x(s, seed=90), A, B, P)
    return float((output - wanted).square().sum() / wanted.square().sum())


def test_P_transfers_between_planted_models_by_gradient_B_only():
    """Train P on model 0, load it into model 1: any other B is worse than zero output, gradient B is useful."""
    anchor, student = Planted.of(24, 20, seed=0), Planted.of(40, 32, seed=50)
    public, private, new = randn(400, 6, seed=100), randn(200, 6, seed=101), randn(300, 6, seed=102)
    task = randn(6, 5, seed=103)

    # the anchor's best P in closed form: its output is linear in P
    x = anchor.x(private, seed=91)
    z, readout = x @ anchor.A.T, anchor.R @ anchor.B
    P = (torch.linalg.pinv(z) @ (private @ task) @ torch.linalg.pinv(readout).T).T
    trained = (anchor.adapter(x, anchor.A, anchor.B, P) - private @ task).square().sum()
    assert trained / (private @ task).square().sum() < 0.25

    # public data: the same examples, on which the two models err alike but not equally
    error = randn(400, 5, seed=104)
    student_error = error + 0.3 * randn(400, 5, seed=105)
    x_anchor, x_student = anchor.x(public, seed=92), student.x(public, seed=93)
    for_A = sums_of(x_student, x_anchor @ anchor.A.T)
    for_B = sums_of(student.gradient(student_error), anchor.gradient(error) @ anchor.B)
    A = fit_A(for_A).A
    wanted = new @ task

    def error_with(A: Tensor, B: Tensor) -> float:
        return transfer_error(A, B, P=P, student=student, s=new, wanted=wanted)

    B = fit_B_from_gradients(for_B)
    errors = {
        "random": error_with(student.A, student.B),
        "A": error_with(A, student.B),
        "A and cca B": error_with(A, rotate_B_by_cca(student.B, A, for_A)),
        "centred A and gradient B": error_with(fit_A(centred(x_student, x_anchor @ anchor.A.T)).A, B),
        "A and gradient B": error_with(A, B),
    }

    print({name: round(error, 3) for name, error in errors.items()})
    assert errors.pop("A and gradient B") < 0.3
    assert min(errors.values()) > 1
    assert errors["A and cca B"] == pytest.approx(errors["A"], rel=0.05)
