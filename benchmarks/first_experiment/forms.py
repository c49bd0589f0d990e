"""Closed forms of alignment: from paired moments to the frozen A, B of anchor (a) and student (b)."""

from __future__ import annotations

import torch
from torch import Tensor

from .bodies import Factors
from .moments import Moments

RANK = 16


def _orthonormal(d: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, RANK, generator=g, dtype=torch.float64))[0]


def _solve(S: Tensor, C: Tensor, ridge: float) -> Tensor:
    return torch.linalg.solve(S + ridge * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype), C)


def _root(S: Tensor, power: float, ridge: float) -> Tensor:
    w, V = torch.linalg.eigh(S + ridge * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype))
    return (V * w.clamp_min(1e-12).pow(power)) @ V.T


def _factors(A: list[Tensor], B: list[Tensor], mean: list[Tensor] | None) -> Factors:
    c = [a @ m if mean is not None else torch.zeros(len(a)) for a, m in zip(A, mean or A, strict=True)]
    return Factors([a.float().contiguous() for a in A], [b.float().contiguous() for b in B], [x.float() for x in c])


def anchor_random(m: Moments, o: Moments, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Random row-orthonormal A [r, d_in] and column-orthonormal B [d_out, r] of the anchor."""
    A = [_orthonormal(len(s), 7919 * seed + 2 * j).T for j, s in enumerate(m.aa)]
    B = [_orthonormal(len(s), 7919 * seed + 2 * j + 1) for j, s in enumerate(o.aa)]
    return A, B


def student_random(m: Moments, o: Moments, seed: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """The same for the student, independent of the anchor."""
    A = [_orthonormal(len(s), 7919 * seed + 2 * j).T for j, s in enumerate(m.bb)]
    B = [_orthonormal(len(s), 7919 * seed + 2 * j + 1) for j, s in enumerate(o.bb)]
    return A, B


def a_least_squares(A: list[Tensor], m: Moments, ridge: float = 1e-3) -> list[Tensor]:
    """A_s = argmin |A_s x_s - A_a x_a|^2 + ridge."""
    return [_solve(bb, ab.T @ a.T, ridge).T for a, bb, ab in zip(A, m.bb, m.ab, strict=True)]


def a_orthonormal(A: list[Tensor]) -> list[Tensor]:
    """Nearest row-orthonormal matrix (the paper's)."""
    return [torch.linalg.svd(a, full_matrices=False).U @ torch.linalg.svd(a, full_matrices=False).Vh for a in A]


def b_gradient(B: list[Tensor], o: Moments, ridge: float = 1e-3, match: bool = False) -> list[Tensor]:
    """B_s = argmin |G_s B_s - G_a B_a|^2 + ridge; ``match`` rescales each column to the anchor's projected RMS."""
    out = []
    for b, aa, bb, ab in zip(B, o.aa, o.bb, o.ab, strict=True):
        s = _solve(bb, ab.T @ b, ridge)
        if match:
            want, have = ((b.T @ aa) * b.T).sum(1), ((s.T @ bb) * s.T).sum(1)
            s = s * (want / have.clamp_min(1e-30)).sqrt()
        out.append(s)
    return out


def b_cca(A_a: list[Tensor], A_s: list[Tensor], B_s: list[Tensor], m: Moments, gamma: float = 1e-4) -> list[Tensor]:
    """The paper's map in its r x r form, from centred z of both models."""
    out = []
    for aa, bb, ab, x, y, b in zip(m.aa, m.bb, m.ab, A_a, A_s, B_s, strict=True):
        C1, C3, C31 = x @ aa @ x.T, y @ bb @ y.T, y @ ab.T @ x.T
        M = _root(C3, -0.5, gamma) @ C31 @ _root(C1, -0.5, gamma)
        U, _, Vh = torch.linalg.svd(M)
        out.append(b @ _root(C3, 0.5, gamma) @ U @ Vh @ _root(C1, -0.5, gamma))
    return out


def canonical(aa: Tensor, bb: Tensor, ab: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Leading canonical directions [d_a, r], [d_b, r] of a pair, ridge relative to the mean variance."""
    Wa, Wb = _root(aa, -0.5, ridge), _root(bb, -0.5, ridge)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        U, _, V = torch.svd_lowrank(Wa @ ab @ Wb, q=3 * RANK, niter=8)
    return Wa @ U[:, :RANK], Wb @ V[:, :RANK]


def normalised(A_a: list[Tensor], A_s: list[Tensor], m: Moments) -> tuple[list[Tensor], list[Tensor]]:
    """Both A divided by the anchor's RMS of z, linear by linear: z has RMS one in the anchor."""
    k = [(a @ aa @ a.T).diagonal().mean().sqrt() for a, aa in zip(A_a, m.aa, strict=True)]
    return [a / c for a, c in zip(A_a, k, strict=True)], [a / c for a, c in zip(A_s, k, strict=True)]


def spread(B_a: list[Tensor], B_s: list[Tensor], norms: list[float]) -> tuple[list[Tensor], list[Tensor]]:
    """Both B times one constant per linear, so that the anchor's columns have the given mean norm."""
    k = [n / b.norm(dim=0).mean() for b, n in zip(B_a, norms, strict=True)]
    return [b * c for b, c in zip(B_a, k, strict=True)], [b * c for b, c in zip(B_s, k, strict=True)]


def correlations(u: list[Tensor], v: list[Tensor], n: Moments) -> list[Tensor]:
    """Per linear, [r]: correlation between the models of each coordinate; rows of u, v are the directions."""
    out = []
    for x, y, aa, bb, ab in zip(u, v, n.aa, n.bb, n.ab, strict=True):
        x, y = x.double(), y.double()
        out.append(((x @ ab) * y).sum(1) / (((x @ aa) * x).sum(1) * ((y @ bb) * y).sum(1)).clamp_min(1e-30).sqrt())
    return out


def shrunk(
    fa: Factors, fb: Factors, m: Moments, o: Moments, power: float = 1.0, cut: float = 0.0
) -> tuple[Factors, Factors]:
    """Rows of A and columns of B times the correlation they keep on held-out public data (to a power; zero below a
    cut).
    """
    ra = [r.clamp_min(0).pow(power).masked_fill(r < cut, 0).float() for r in correlations(fa.A, fb.A, m)]
    rb = [
        r.clamp_min(0).pow(power).masked_fill(r < cut, 0).float()
        for r in correlations([b.T for b in fa.B], [b.T for b in fb.B], o)
    ]
    new = [
        Factors(
            [a * r[:, None] for a, r in zip(f.A, ra, strict=True)],
            [b * r for b, r in zip(f.B, rb, strict=True)],
            [c * r for c, r in zip(f.c, ra, strict=True)],
            f.scale,
        )
        for f in (fa, fb)
    ]
    return new[0], new[1]


def quality(fa: Factors, fb: Factors, m: Moments, o: Moments) -> tuple[float, float]:
    """Mean correlation between the models of the coordinates of z, and of the projected gradients."""
    z, g = correlations(fa.A, fb.A, m), correlations([b.T for b in fa.B], [b.T for b in fb.B], o)
    return float(torch.stack(z).nanmean()), float(torch.stack(g).nanmean())


def make(form: str, m: Moments, o: Moments, seed: int = 0, ridge: float = 1e-2) -> tuple[Factors, Factors]:
    """The pair of factors of one named form; A scaled to unit z, B to unit columns in the anchor."""
    form, _, raw = form.partition("/")  # "FORM/raw": no offset, as in the paper
    centre = not raw
    A, B = anchor_random(m, o, seed)
    As, Bs = student_random(m, o, seed + 1)
    ones = [1.0] * len(B)
    if form != "unaligned":
        As = a_least_squares(A, m, ridge)
    if form == "orthonormal+cca":
        As = a_orthonormal(As)
        Bs = b_cca(A, As, Bs, m)
    elif form == "lsq+cca":
        Bs = b_cca(A, As, Bs, m)
    elif form in ("lsq+gradient", "lsq+gradient-matched"):
        Bs = b_gradient(B, o, ridge, form.endswith("matched"))
    elif form.startswith("canonical"):
        pairs = [canonical(*t, ridge * 10) for t in zip(m.aa, m.bb, m.ab, strict=True)]
        A, As = [p[0].T for p in pairs], [p[1].T for p in pairs]
        pairs = [canonical(*t, ridge * 10) for t in zip(o.aa, o.bb, o.ab, strict=True)]
        B, Bs = [p[0] for p in pairs], [p[1] for p in pairs]
    elif form != "unaligned":
        raise ValueError(form)
    A, As = normalised(A, As, m)
    if form == "unaligned":  # unit z in the student too
        k = [(y @ bb @ y.T).diagonal().mean().sqrt() for y, bb in zip(As, m.bb, strict=True)]
        As = [y / c for y, c in zip(As, k, strict=True)]
    B, Bs = spread(B, Bs, ones)
    return _factors(A, B, m.ma if centre else None), _factors(As, Bs, m.mb if centre else None)
