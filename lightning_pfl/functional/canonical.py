r"""Coordinates that several models have in common: directions in which what one model sees can be told from the others.

Start at `common_directions`. Least squares make a student follow coordinates that the anchor drew at random, most of
which have no counterpart in the student. Canonical analysis asks the other way round: which directions of *both* models
say the same? Where the answer is "hardly any", as for queries and keys of two families, the held-out `agreement` says
so, and the coordinate can be turned down instead of carrying noise from one model into the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_pfl.functional.alignment import PairedSums

__all__ = ["Directions", "agreement", "common_directions"]


@dataclass(frozen=True, eq=False)
class Directions:
    """Coordinates in an anchor's and in its students' vectors, row by row the same.

    Attributes:
        anchor: shape ``[r, d_anchor]``, float64; each row has unit variance over what was fitted, up to the ridge.
        students: one per student, shape ``[r, d_student]``, likewise.
    """

    anchor: Tensor
    students: Sequence[Tensor]


def common_directions(
    pairs: Sequence[PairedSums],
    rank: int,
    *,
    ridge: float = 0.1,
    centred: bool = True,
    blind_to: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> Directions:
    r"""The r directions of the anchor that its students tell best, and each student's own directions for them.

    With one student these are the leading canonical directions. With several, the anchor's directions maximise the sum
    over students of the variance that each student explains,
    :math:`\sum_s W C_s S_s^{-1} C_s^\top W^\top` with :math:`W S_a W^\top = I`, so that all share one coordinate
    system.

    Args:
        pairs: per student, sums over tokens of its vectors (``x``) and the anchor's own (``z``, all ``d_anchor`` of
            them, not projected).
        rank: r.
        ridge: added to every covariance, in units of its mean variance. Directions are estimated from fewer tokens
            than there are pairs of features, so it is not small.
        centred: whether means are taken off (activations) or not (gradients).
        blind_to: per student, one vector of its own and one of the anchor's on which all directions are zero: the means
            of the raw activations, so that a coordinate carries no constant, which would be another in each model.

    Returns:
        The directions, the best first. Signs are fixed by the anchor's largest entry, so that equal sums give equal
        bytes.

    Raises:
        ValueError: no student, fewer tokens than r, or a rank above a width.

    Source:
        Hotelling 1936 for one student; Kettenring, Biometrika 1971 (MAXVAR) for several, with the anchor's space as
        the common one.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> common = torch.randn(400, 1, generator=generator)
        >>> noise = torch.randn(400, 5, generator=generator)
        >>> sums = PairedSums(3, 4)
        >>> sums.add(torch.cat([noise[:, :2], common], 1), torch.cat([-common, noise[:, 2:]], 1))
        >>> found = common_directions([sums], rank=1, ridge=1e-3)
        >>> found.anchor.abs().argmax().item(), found.students[0].abs().argmax().item()
        (0, 2)
    """
    if not pairs:
        raise ValueError("Common directions need at least one student beside the anchor, but there is none.")
    for sums in pairs:
        if sums.count < rank:
            raise ValueError(
                f"Aligning rank {rank} needs at least {rank} tokens that both models have read, but there are "
                f"{sums.count}. Give more public data, or check that both models read the same."
            )
        if rank > min(sums.x.numel(), sums.z.numel()):
            raise ValueError(f"Rank {rank} is more than a width: {sums.x.numel()} or {sums.z.numel()}. Lower the rank.")
    blinds: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(pairs)
    if blind_to is not None:
        mean_of_anchor = torch.stack([other for _, other in blind_to]).mean(0)
        blinds = [(_without(own), _without(mean_of_anchor)) for own, _ in blind_to]
    covariances = [_covariances(sums, ridge, centred, blind) for sums, blind in zip(pairs, blinds, strict=True)]
    root = torch.linalg.cholesky(torch.stack([zz for _, _, zz in covariances]).mean(0))
    solved = [torch.cholesky_solve(xz, torch.linalg.cholesky(xx)) for xx, xz, _ in covariances]
    told_by = torch.stack([xz.T @ s for (_, xz, _), s in zip(covariances, solved, strict=True)]).sum(0)
    half = torch.linalg.solve_triangular(root, told_by, upper=False)
    explained = torch.linalg.solve_triangular(root, half.T, upper=False)
    _, vectors = torch.linalg.eigh((explained + explained.T) / 2)
    top = vectors[:, -rank:].flip(1)
    top = top * top.gather(0, top.abs().argmax(0, keepdim=True)).sign()
    anchor = _apply(torch.linalg.solve_triangular(root.T, top, upper=True).T, blinds[0][1])
    students = []
    for (xx, _, _), s, (blind, _) in zip(covariances, solved, blinds, strict=True):
        told = _apply((s @ anchor.T).T, blind)
        spread = ((told @ xx) * told).sum(1, keepdim=True).clamp_min(1e-300).sqrt()
        students.append(told / spread)
    return Directions(anchor, students)


def agreement(student: Tensor, anchor: Tensor, sums: PairedSums, *, centred: bool = True) -> Tensor:
    """Correlation between two models of each coordinate.

    Args:
        student: directions, shape ``[r, d_student]``.
        anchor: directions, shape ``[r, d_anchor]``.
        sums: of the student's vectors and the anchor's, over tokens that the fit has not seen: over those that it has
            seen, correlations look two to three times as good as they are.
        centred: as in the fit.

    Returns:
        Shape ``[r]``, float64, between -1 and 1; 0 for a coordinate that does not vary.

    Example:
        >>> sums = PairedSums(1, 1)
        >>> sums.add(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1.0], [3.0], [2.0]]))
        >>> agreement(torch.ones(1, 1), torch.ones(1, 1), sums).item()
        0.5
    """
    xx, xz, zz = sums.products(centred=centred)
    student, anchor = student.to(xx), anchor.to(xx)
    both = ((student @ xz) * anchor).sum(1)
    own = ((student @ xx) * student).sum(1) * ((anchor @ zz) * anchor).sum(1)
    return torch.where(own > 0, both / own.clamp_min(1e-300).sqrt(), 0.0)


def _covariances(
    sums: PairedSums, ridge: float, centred: bool, blind: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Covariances of x with x, of x with z, of z with z; ridges on the first and last."""
    xx, xz, zz = (product / sums.count for product in sums.products(centred=centred))
    for name, product in (("student", xx), ("anchor", zz)):
        if not torch.trace(product) > 0:
            raise ValueError(
                f"The {name}'s vectors of these {sums.count} tokens are all the same; use more varied data."
            )
    own, other = blind
    xx, xz, zz = _apply(_apply(xx, own).T, own), _apply(_apply(xz, other).T, own).T, _apply(_apply(zz, other).T, other)
    return _ridged(xx, ridge), xz, _ridged(zz, ridge)


def _without(vector: Tensor) -> Tensor | None:
    """The unit vector to be blind to; None if there is nothing to be blind to."""
    length = vector.norm()
    return vector / length if length > 0 else None


def _apply(rows: Tensor, unit: Tensor | None) -> Tensor:
    """Rows without their part along a unit vector."""
    return rows if unit is None else rows - torch.outer(rows @ unit, unit)


def _ridged(matrix: Tensor, ridge: float) -> Tensor:
    size = len(matrix)
    return matrix + ridge * torch.trace(matrix) / size * torch.eye(size, dtype=matrix.dtype, device=matrix.device)
