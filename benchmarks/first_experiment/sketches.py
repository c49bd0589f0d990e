"""Relevance: gradients of a frozen proxy's last down_proj, projected to 16,384 numbers; cosines; rows of weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .engine import Arch
from .suite import Task

WIDTH = 16_384


def per_example(arch: Arch, task: Task, n: int) -> tuple[Tensor, Tensor]:
    """Two factors per train sample whose outer product is its gradient: delta [n, d], u [n, ffn]; autograd through
    the tail.
    """
    body, h = arch.body, arch.states[task.name]["train"][:n]
    mask = arch.masks[task.name][None].expand(len(h), -1, -1)
    kept: dict[str, Tensor] = {}

    def lin(i: int, role: str, x: Tensor) -> Tensor:
        y = F.linear(x, body.layers[i][role])
        if i == body.depth - 1 and role == "down":
            y = y.detach().requires_grad_(True)
            kept["u"], kept["y"] = x.detach().float()[:, 0], y
        return y

    with torch.enable_grad():
        x = body.above(h, mask, lin)
        rows = arch.rows[task.name]
        z = x @ body.embedding[rows[rows >= 0]].float().T - arch.prior[task.name][rows >= 0]
        g = torch.autograd.grad(F.cross_entropy(z, task.y["train"][: len(h)], reduction="sum"), kept["y"])[0]
    return g.float()[:, 0], kept["u"]


class Projection:
    """Seeded signed hashing of a [d, ffn] gradient to WIDTH numbers (a sparse random projection)."""

    def __init__(self, d: int, ffn: int, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.bucket = torch.randint(WIDTH, (d * ffn,), generator=g)
        self.sign = torch.randint(2, (d * ffn,), generator=g).float() * 2 - 1

    def __call__(self, delta: Tensor, u: Tensor) -> Tensor:
        """Mean gradient of the rows given, projected."""
        flat = (delta.T @ u / len(u)).flatten() * self.sign
        return torch.zeros(WIDTH).index_add_(0, self.bucket, flat)


def cosines(sketches: Tensor) -> Tensor:
    """[N, N]."""
    s = sketches / sketches.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return s @ s.T


def weights(cos: Tensor, policy: str, oracle: Tensor, include_self: bool) -> Tensor:
    """Rows that sum to one. Policies: uniform, oracle, t<temperature>, z<temperature> (row-standardised cosines)."""
    N = len(cos)
    eye = torch.eye(N, dtype=torch.bool)
    if policy == "shrink":  # half of oneself and nothing else: what averaging does without anybody's information
        return 0.5 * torch.eye(N)
    if policy == "wrong":  # the oracle's row of a neighbour: as many strangers as there were relatives
        half = N // 2
        oracle = oracle[[half * (i // half) + (i + 1) % half for i in range(N)]]
        policy = "oracle"
    if policy == "uniform":
        w = torch.ones(N, N)
    elif policy == "oracle":
        w = oracle.clone()
        alone = w.sum(1) == 0
        w[alone] = 1.0
        w[eye] = 1.0
        w[alone] = torch.where(eye[alone], 1.0, 0.0) if include_self else 1.0
    else:
        c = cos.clone()
        if policy[0] == "z":
            off = c.masked_fill(eye, float("nan"))
            mu = off.nanmean(1, keepdim=True)
            sd = ((off - mu) ** 2).nanmean(1, keepdim=True).sqrt().clamp_min(1e-6)
            c = ((c - mu) / sd).masked_fill(eye, 0)
            c[eye] = c.masked_fill(eye, -1e9).max(1).values  # the client counts as its nearest relative
        w = (c / float(policy[1:])).sub((c / float(policy[1:])).max(1, keepdim=True).values).exp()
    if not include_self:
        w = w.masked_fill(eye, 0.0)
    return w / w.sum(1, keepdim=True)
