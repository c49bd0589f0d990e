r"""Bases A and B that make one model's P and Q mean the same in another model: sums over tokens in, bases out.

A Co-LoRA adapter adds :math:`s\,B(P\,A x + Q)`. A P that was trained on another model (the anchor) is of use here only
if ``A x`` spans the same coordinates in both models *and* a step along a coordinate does the same to both losses.
Start at `fit_A`, which sees to the first, and `fit_B_from_gradients`, which sees to the second; `rotate_B_by_cca` is
the paper's way for the second. All three need `PairedSums` only, which are gathered token by token in
O(d^2 + d r) memory.

Which tokens of two models belong together, and where activations and gradients come from, is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = [
    "PairedSums",
    "Projection",
    "choose_ridge",
    "fit_A",
    "fit_B_from_gradients",
    "rotate_B_by_cca",
    "unexplained",
]

_RIDGES = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@final
class PairedSums:
    """Running sums over tokens of a student's vectors x and an anchor's vectors z, in float64.

    Args:
        num_inputs: d, the length of an x.
        num_targets: r, the length of a z.
        device: where the sums live.

    Attributes:
        count: how many tokens were added.
        x: shape ``[d]``; z: shape ``[r]``; xx: shape ``[d, d]``; xz: shape ``[d, r]``; zz: shape ``[r, r]``.

    Example:
        >>> import torch
        >>> sums = PairedSums(2, 1)
        >>> sums.add(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0], [3.0]]))
        >>> sums.count, sums.xz.flatten().tolist()
        (2, [2.0, 3.0])
    """

    def __init__(self, num_inputs: int, num_targets: int, *, device: torch.device | str | None = None) -> None:
        self.count = 0
        self.x = torch.zeros(num_inputs, dtype=torch.float64, device=device)
        self.z = torch.zeros(num_targets, dtype=torch.float64, device=device)
        self.xx = torch.zeros(num_inputs, num_inputs, dtype=torch.float64, device=device)
        self.xz = torch.zeros(num_inputs, num_targets, dtype=torch.float64, device=device)
        self.zz = torch.zeros(num_targets, num_targets, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, x: Tensor, z: Tensor) -> None:
        """Add tokens.

        Args:
            x: shape ``[tokens, d]``, any float dtype.
            z: shape ``[tokens, r]``, row by row the anchor's vectors of the same tokens.

        Raises:
            ValueError: shapes that do not fit, or a number that is not finite.
        """
        if x.shape[1:] != self.x.shape or z.shape[1:] != self.z.shape or x.shape[0] != z.shape[0]:
            raise ValueError(
                f"`x` and `z` must be [tokens, {self.x.numel()}] and [tokens, {self.z.numel()}] with the same tokens, "
                f"but are {list(x.shape)} and {list(z.shape)}."
            )
        x, z = x.to(self.xx), z.to(self.zz)
        if not (torch.isfinite(x).all() and torch.isfinite(z).all()):
            raise ValueError(
                "Public data gave an activation or a gradient that is not finite. Run the models in float32 or "
                "bfloat16 (float16 overflows without a loss scaler), and leave out texts on which a loss is not finite."
            )
        self.count += x.shape[0]
        self.x += x.sum(0)
        self.z += z.sum(0)
        self.xx.addmm_(x.T, x)
        self.xz.addmm_(x.T, z)
        self.zz.addmm_(z.T, z)

    def products(self, *, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
        """``x'x``, ``x'z`` and ``z'z`` summed over tokens, of deviations from the mean when ``centred``."""
        if not centred:
            return self.xx, self.xz, self.zz
        n = max(self.count, 1)
        return (
            self.xx - torch.outer(self.x, self.x) / n,
            self.xz - torch.outer(self.x, self.z) / n,
            self.zz - torch.outer(self.z, self.z) / n,
        )


@dataclass(frozen=True, eq=False)
class Projection:
    """A down projection, factored as A = K A_o.

    Attributes:
        K: shape ``[r, r]``, symmetric; the identity when only an orthonormal basis was asked for.
        orthonormal: A_o, shape ``[r, d_in]``, with orthonormal rows.
    """

    K: Tensor
    orthonormal: Tensor

    @property
    def A(self) -> Tensor:
        """The product, shape ``[r, d_in]``."""
        return self.K @ self.orthonormal


def fit_A(sums: PairedSums, *, ridge: float | None = None, orthonormal_only: bool = False) -> Projection:
    r"""The student's A whose ``A x`` is closest to the anchor's z, :math:`\arg\min_A \sum \|A x - z\|^2`.

    Args:
        sums: of the student's inputs x ``[d_in]`` and the anchor's z = A x ``[r]``, over the same tokens.
        ridge: penalty on ``|A|^2`` in units of x's mean square. None: 1e-2 with fewer than four tokens per input,
            where plain least squares fit noise, else 1e-6. `choose_ridge` does better.
        orthonormal_only: return the nearest matrix with orthonormal rows, as in the paper. It forgets the scale of
            each direction: on strongly anisotropic inputs its z is worse than zero.

    Returns:
        A = K A_o in float64. Nothing is centred: a layer applies P to z as it is, so the mean of z, usually its larger
        part, must agree as well, or a P that was trained on one model meets another constant in the other.

    Raises:
        ValueError: fewer tokens than r, or a rank that the student's inputs cannot reach.

    Source:
        arXiv:2506.11024 trains A by gradient descent on the same loss with an orthogonality penalty and takes the
        nearest orthonormal matrix; this is the loss's closed form, and keeps the scale.

    Example:
        >>> import torch
        >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> sums = PairedSums(4, 1)
        >>> sums.add(x, 3 * x[:, :1])
        >>> fit_A(sums).A.round(decimals=3).tolist()[0][0]
        3.0
    """
    U, S, Vh = torch.linalg.svd(_least_squares(sums, ridge), full_matrices=False)
    reached = int(S.gt(1e-9 * S[0]).sum())
    if reached < len(S):
        raise ValueError(
            f"The student's aligned A must have rank {len(S)}, but public data gave it rank {reached}: the anchor's z "
            "or the student's x do not vary in enough directions. Use more varied public data or a smaller rank."
        )
    K = torch.eye(len(S), dtype=U.dtype, device=U.device) if orthonormal_only else (U * S) @ U.T
    return Projection(K=K, orthonormal=U @ Vh)


def fit_B_from_gradients(sums: PairedSums, *, ridge: float | None = None) -> Tensor:
    r"""The student's B along which its loss changes as the anchor's does, :math:`\arg\min_B \sum_t \|B' g_t - z_t\|^2`.

    The dual of `fit_A`: a step v in rank space changes the loss by ``g' B v``, so equal ``B' g`` means equal effects.

    Args:
        sums: of the student's loss gradients g at the module's output ``[d_out]`` and the anchor's
            ``z = B_a' g_a`` ``[r]``, over the same tokens.
        ridge: as in `fit_A`.

    Returns:
        B, shape ``[d_out, r]``, float64. Nothing is centred: a constant gradient is an effect, too.

    Raises:
        ValueError: fewer tokens than r.

    Example:
        >>> import torch
        >>> g = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> sums = PairedSums(3, 1)
        >>> sums.add(g, g[:, 1:2] - g[:, 2:3])
        >>> fit_B_from_gradients(sums).round(decimals=3).flatten().abs().tolist()
        [0.0, 1.0, 1.0]
    """
    return _least_squares(sums, ridge).T.contiguous()


def rotate_B_by_cca(B: Tensor, A: Tensor, sums: PairedSums, *, gamma: float = 1e-4) -> Tensor:
    r"""The paper's alignment of B: whiten by the anchor's covariance, rotate by CCA, colour by the student's.

    The paper computes :math:`S_{33}^{1/2} U V' S_{11}^{-1/2} B_a` on d_out x d_out covariances of ``B A x``. While both
    B have orthonormal columns, that equals :math:`B\,C_3^{1/2} U_r V_r' C_1^{-1/2}` on the r x r covariances of
    ``z = A x``. So it only rotates inside the column space that B had before, and with A aligned it is nearly the
    identity.

    Args:
        B: the student's own, shape ``[d_out, r]``, orthonormal columns.
        A: the student's, already aligned, shape ``[r, d_in]``.
        sums: of the student's inputs x ``[d_in]`` and the anchor's z ``[r]``; those that A was fitted on will do.
        gamma: added to the diagonal of both summed covariances.

    Returns:
        Shape ``[d_out, r]``, float64.

    Raises:
        ValueError: B without orthonormal columns, or fewer tokens than r.

    Source:
        arXiv:2506.11024, section on initial alignment; the r x r form is ours, exact in float64.

    Example:
        >>> import torch
        >>> z = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> sums = PairedSums(2, 2)
        >>> sums.add(z, z)
        >>> torch.allclose(rotate_B_by_cca(torch.eye(3, 2), torch.eye(2), sums), torch.eye(3, 2).double(), atol=1e-5)
        True
    """
    rank = sums.z.numel()
    _check_tokens(sums.count, rank)
    B, A = B.to(sums.xx), A.to(sums.xx)
    eye = torch.eye(rank, dtype=B.dtype, device=B.device)
    if not torch.allclose(B.T @ B, eye, atol=1e-4):
        raise ValueError(
            "The r x r form of the paper's CCA step needs a B with orthonormal columns, but B'B is off the identity by "
            f"{float((B.T @ B - eye).abs().max()):.2g}. Pass the student's B from before any alignment."
        )
    xx, xz, zz = sums.products(centred=True)
    C1, C3 = zz + gamma * eye, A @ xx @ A.T + gamma * eye
    U, _, Vh = torch.linalg.svd(_symmetric_power(C3, -0.5) @ (A @ xz) @ _symmetric_power(C1, -0.5))
    rotated: Tensor = B @ _symmetric_power(C3, 0.5) @ U @ Vh @ _symmetric_power(C1, -0.5)
    return rotated


def unexplained(weight: Tensor, sums: PairedSums, *, of_variation: bool = True) -> float:
    r"""Which share of the anchor's vectors the student misses, :math:`\sum\|W x - z\|^2 / \sum\|z - \bar z\|^2`.

    Args:
        weight: A, or the transpose of B, shape ``[r, d]``.
        sums: over tokens that the fit has not seen, for an honest answer.
        of_variation: measure against how z varies (above), so that its mean does not flatter; False: against z itself,
            :math:`\sum\|z\|^2`, which is right for gradients.

    Returns:
        0: perfect; 1: as good as always answering the mean (or zero); above 1: worse than that.

    Raises:
        ValueError: the anchor's vectors do not vary (or are zero), so that there is nothing to explain.

    Example:
        >>> import torch
        >>> sums = PairedSums(1, 1)
        >>> sums.add(torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0], [-2.0]]))
        >>> unexplained(torch.tensor([[1.0]]), sums)
        0.25
    """
    total = float(torch.trace(sums.products(centred=of_variation)[2]))
    if not total > 1e-12 * float(torch.trace(sums.zz)):
        raise ValueError(f"The anchor's vectors of these {sums.count} tokens are all the same; use more varied data.")
    return _missed(weight, sums) / total


def choose_ridge(fit: PairedSums, held_out: PairedSums, *, ridges: Sequence[float] = _RIDGES) -> float:
    """The ridge whose least squares on ``fit`` leaves least of ``held_out`` unexplained.

    Args:
        fit: sums that the candidates are fitted on.
        held_out: sums over other texts. With seven candidates and hundreds of tokens the chosen one's error there is
            hardly flattered by the choice.
        ridges: candidates, in units of x's mean square.

    Raises:
        ValueError: no held-out tokens, or fewer tokens than r.

    Example:
        >>> import torch
        >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> fit, held_out = PairedSums(2, 1), PairedSums(2, 1)
        >>> fit.add(x[:32], x[:32, :1])
        >>> held_out.add(x[32:], x[32:, :1])
        >>> choose_ridge(fit, held_out, ridges=(1e-6, 1e-1))
        1e-06
    """
    if held_out.count < 2:
        raise ValueError(f"Choosing a ridge needs held-out tokens, but there are {held_out.count}.")
    return min(ridges, key=lambda ridge: _missed(_least_squares(fit, ridge), held_out))


def _missed(weight: Tensor, sums: PairedSums) -> float:
    """Squared error of ``W x`` against z, summed."""
    weight = weight.to(sums.xx)
    square = ((weight @ sums.xx) * weight).sum() - 2 * (weight.T * sums.xz).sum() + torch.trace(sums.zz)
    return max(float(square), 0.0)


def _least_squares(sums: PairedSums, ridge: float | None) -> Tensor:
    """W of shape ``[r, d]`` that minimises the squared error of ``W x`` against z plus the ridge's penalty."""
    _check_tokens(sums.count, sums.z.numel())
    size = sums.xx.shape[0]
    if ridge is None:
        ridge = 1e-2 if sums.count < 4 * size else 1e-6
    penalty = ridge * torch.trace(sums.xx) / size
    if not penalty > 0:
        raise ValueError(
            f"Least squares need a positive ridge and inputs that are not all zero, but the ridge is {ridge} and the "
            f"inputs' mean square is {float(torch.trace(sums.xx)) / size / max(sums.count, 1):.3g}."
        )
    factor = torch.linalg.cholesky(sums.xx + penalty * torch.eye(size, dtype=sums.xx.dtype, device=sums.xx.device))
    return torch.cholesky_solve(sums.xz, factor).T


def _check_tokens(count: int, rank: int) -> None:
    if count < rank:
        raise ValueError(
            f"Aligning rank {rank} needs at least {rank} tokens that both models have read, but there are {count}. "
            "Give more public data (some hundred tokens per unit of rank), or check that both models read the same."
        )


def _symmetric_power(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    result: Tensor = (vectors * values.pow(power)) @ vectors.T
    return result
