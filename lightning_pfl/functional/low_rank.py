r"""Means of products B A that are kept as their factors: exact, of any ranks, and never as a d x d matrix.

Averaging factors is not averaging what they do: :math:`\frac12 (B_1 + B_2) \cdot \frac12 (A_1 + A_2)` holds the cross
terms :math:`B_1 A_2` and :math:`B_2 A_1`, which nobody trained. The mean of products is
:math:`[w_1 B_1 \dots w_N B_N] [A_1; \dots; A_N]`, a product of the stacked factors. QR of both stacks leaves a core
of at most :math:`\sum r_k` rows and columns, whose SVD gives the best approximation of any rank, and its error.

Start at `product_mean` (one mean) or `product_means` (a mean of its own for everybody, from one pair of QRs). A product
does not say which of its factors :math:`B R^{-1}, R A` is meant; `product_mean` says which are given, so that a client
can train on.

Source:
    Eckart and Young, Psychometrika 1936, for the truncation; QR of stacked factors is the usual way of adding matrices
    of low rank. Servers that average LoRA exactly form the d x d product instead (FlexLoRA, arXiv:2402.11505).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_pfl.functional.colora import one_thread

__all__ = ["Factors", "LowRankMean", "product_mean", "product_means"]


@dataclass(frozen=True, eq=False)
class Factors:
    """A matrix ``[d_out, d_in]`` of rank r as the product B A.

    Attributes:
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.

    Raises:
        ValueError: shapes that are not those of two factors.

    Example:
        >>> Factors(A=torch.ones(2, 5), B=torch.ones(3, 2)).rank
        2
    """

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ValueError(
                f"Two factors must be A [r, d_in] and B [d_out, r] of one rank r, but are {tuple(self.A.shape)} and "
                f"{tuple(self.B.shape)}."
            )

    @property
    def rank(self) -> int:
        """r, how many rows A has; the matrix itself may be of a lower one."""
        return self.A.shape[0]


@dataclass(frozen=True, eq=False)
class LowRankMean:
    """A mean of products, cut to a rank.

    Attributes:
        factors: of the cut mean, in the dtype of the first client's.
        error: Frobenius norm of what the rank has cut off; no matrix of that rank is nearer to the mean.
        norm: Frobenius norm of the whole mean.
    """

    factors: Factors
    error: float
    norm: float

    @property
    def lost(self) -> float:
        """The error's share of the norm, 0 to 1; 0 where there is nothing to lose."""
        return self.error / self.norm if self.norm else 0.0


def product_mean(
    factors: Sequence[Factors],
    weights: Sequence[float] | Tensor,
    *,
    rank: int | None = None,
    like: Tensor | None = None,
    ordered: bool = False,
) -> LowRankMean:
    r"""The best approximation of rank r of :math:`\sum_k w_k B_k A_k / \sum_k w_k`.

    Args:
        factors: one per client; widths are equal, ranks need not be.
        weights: one number per client, >= 0. Only ratios matter.
        rank: r. None: the largest of the clients'.
        like: which of the many factors of the result are given. A tensor ``[r, d_in]``: A has orthogonal rows of one
            length, that of ``like`` (root mean square), turned towards ``like`` as far as turning can. So A has full
            rank even where the mean has not (at B = 0, say) and can be trained on, and equal clients whose A has
            orthogonal rows of one length, as it nearly has from its initialisation on, get their own factors back.
            None: A and B share the singular values evenly.
        ordered: leave rows of A and columns of B in the order of their singular values, instead of turning them, so
            that the first few ranks are the best approximation of that rank.

    Returns:
        The factors, computed in at least float32 and cast back, and the error of the cut.

    Raises:
        ValueError: no client, widths that differ, a rank below 1, a ``like`` of another shape, weights that are
            negative, not finite or all zero.

    Example:
        >>> one, two = Factors(torch.eye(2), torch.eye(2)), Factors(torch.eye(2), -torch.eye(2))
        >>> mean = product_mean([one, two], [3, 1])
        >>> (mean.factors.B @ mean.factors.A).round(decimals=5).tolist(), mean.lost
        ([[0.5, 0.0], [0.0, 0.5]], 0.0)
        >>> round(product_mean([one, two], [3, 1], rank=1).lost, 3)  # of two equal singular values, one is cut off
        0.707
    """
    _check(factors)
    masses = _masses(weights, (len(factors),))
    if not masses.sum() > 0:
        raise ValueError(f"A mean needs a client with a positive weight, but the weights are {masses.tolist()}.")
    wanted = max(one.rank for one in factors) if rank is None else rank
    with one_thread():
        return _Stack(factors).mean(masses / masses.sum(), wanted, like, ordered)


def product_means(factors: Sequence[Factors], rows: Tensor) -> list[LowRankMean | None]:
    """Give every client its own mean of all clients' products, in its own rank and near its own A.

    Args:
        factors: one per client, N of them; widths are equal, ranks need not be.
        rows: shape ``[N, N]``, entries >= 0; row i is how client i's mean weighs the clients. Only ratios matter.

    Returns:
        N means; None for a row of zeros. A row that weighs a single client of the same rank gives that client's very
        factors.

    Raises:
        ValueError: as `product_mean`.

    Example:
        >>> one = Factors(torch.eye(2), torch.eye(2))
        >>> two = Factors(torch.eye(2), 3 * torch.eye(2))
        >>> means = product_means([one, two], torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
        >>> [(mean.factors.B @ mean.factors.A).round(decimals=5).diag().tolist() for mean in means]
        [[3.0, 3.0], [2.0, 2.0]]
    """
    _check(factors)
    masses = _masses(rows, (len(factors), len(factors)))
    with one_thread():
        stack = _Stack(factors)
        means: list[LowRankMean | None] = []
        for own, row in zip(factors, masses, strict=True):
            if not row.sum() > 0:
                means.append(None)
            elif (only := _only(factors, row)) is not None and only.rank == own.rank:
                norm = _norm(only)
                means.append(LowRankMean(Factors(only.A.clone(), only.B.clone()), error=0.0, norm=norm))
            else:
                means.append(stack.mean(row / row.sum(), own.rank, own.A))
    return means


class _Stack:
    """All clients' factors, stacked and orthogonalised once."""

    def __init__(self, factors: Sequence[Factors]) -> None:
        self.dtype = factors[0].A.dtype
        wide = torch.promote_types(self.dtype, torch.float32)
        self.ranks = torch.tensor([one.rank for one in factors])
        self.basis_in, self.core_in = torch.linalg.qr(torch.cat([one.A.to(wide) for one in factors]).T)
        self.basis_out, self.core_out = torch.linalg.qr(torch.cat([one.B.to(wide) for one in factors], dim=1))

    def mean(self, weights: Tensor, rank: int, like: Tensor | None, ordered: bool = False) -> LowRankMean:
        if rank < 1:
            raise ValueError(f"The rank of a mean must be at least 1, but is {rank}.")
        each = weights.repeat_interleave(self.ranks).to(self.core_out.dtype)
        left, values, right = torch.linalg.svd((self.core_out * each) @ self.core_in.T, full_matrices=False)
        out = _padded(self.basis_out @ left[:, :rank], rank, dim=1)
        into = _padded(right[:rank] @ self.basis_in.T, rank, dim=0)
        kept = _padded(values[:rank], rank, dim=0)
        if like is None:
            A, B = kept.sqrt()[:, None] * into, out * kept.sqrt()
        else:
            A, B = _turned(into, out * kept, like.to(into.dtype), ordered)
        squares = values.double().square()
        return LowRankMean(
            Factors(A.to(self.dtype), B.to(self.dtype)),
            error=math.sqrt(squares[rank:].sum().item()),
            norm=math.sqrt(squares.sum().item()),
        )


def _turned(A: Tensor, B: Tensor, like: Tensor, ordered: bool) -> tuple[Tensor, Tensor]:
    """The same product with A, whose rows are orthonormal, stretched to another A's length and turned towards it."""
    if like.shape != A.shape:
        raise ValueError(
            f"`like` must have the shape of the mean's A, {tuple(A.shape)}, but has {tuple(like.shape)}. Pass the A of "
            "a client of that rank."
        )
    length = like.norm() / math.sqrt(like.shape[0])
    if length == 0:
        return A, B
    if ordered:
        return length * A, B / length
    left, _, right = torch.linalg.svd(like @ A.T)
    turn = left @ right
    return length * turn @ A, B @ turn.T / length


def _padded(tensor: Tensor, size: int, *, dim: int) -> Tensor:
    """With zeros at the end of a dimension, up to a size."""
    if tensor.shape[dim] >= size:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def _only(factors: Sequence[Factors], row: Tensor) -> Factors | None:
    """The one client that a row weighs, if it is one."""
    weighed = row.nonzero().flatten().tolist()
    return factors[weighed[0]] if len(weighed) == 1 else None


def _norm(factors: Factors) -> float:
    """Frobenius norm of B A from two r x r matrices."""
    A, B = factors.A.double(), factors.B.double()
    return math.sqrt(max(0.0, ((A @ A.T) * (B.T @ B)).sum().item()))


def _check(factors: Sequence[Factors]) -> None:
    if not factors:
        raise ValueError("A mean needs at least one client's factors, but there are none.")
    widths = {(one.A.shape[1], one.B.shape[0]) for one in factors}
    if len(widths) > 1:
        raise ValueError(
            f"Products can be averaged only if they have one input and one output width, but they have {sorted(widths)}"
            ". Average A and B among clients of one architecture."
        )


def _masses(weights: Sequence[float] | Tensor, shape: tuple[int, ...]) -> Tensor:
    masses = torch.as_tensor(weights, dtype=torch.float64)
    if tuple(masses.shape) != shape:
        raise ValueError(f"There must be one weight per client, shape {shape}, but it is {tuple(masses.shape)}.")
    if not bool(torch.isfinite(masses).all()) or bool((masses < 0).any()):
        raise ValueError(f"Weights must be finite and not negative, but are {masses.tolist()}.")
    return masses
