"""A cheap look at an alignment: do both models ask the same change of P for the same task?

Cosine of the mean gradient of P (at P = 0) between the two models, task by task, before and after taking away the mean
over tasks (what every task asks for, such as preferring the words on offer).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .bodies import Factors, Maps
from .engine import Arch, scores, zeros
from .suite import Task


def asked(arch: Arch, tasks: list[Task], factors: Factors, n: int = 64, batch: int = 8) -> Tensor:
    """[tasks, J, r, r + 1]: mean gradient of (P, Q) over the first n train samples."""
    P, Q = zeros(arch, len(tasks))
    P.requires_grad_(True), Q.requires_grad_(True)
    mask = torch.stack([arch.masks[t.name] for t in tasks])
    rows = torch.stack([arch.rows[t.name] for t in tasks])
    prior = torch.stack([arch.prior[t.name] for t in tasks])
    total = torch.zeros(*P.shape[:-1], P.shape[-1] + 1)
    for s in range(0, n, batch):
        h = torch.stack([arch.states[t.name]["train"][s : s + batch] for t in tasks])
        y = torch.stack([t.y["train"][s : s + batch] for t in tasks])
        z = scores(arch, h, mask, rows, prior, factors, Maps(P, Q))
        gp, gq = torch.autograd.grad(F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum"), [P, Q])
        total += torch.cat([gp, gq[..., None]], -1)
    return total / n


def agreement(ga: Tensor, gb: Tensor) -> dict[str, float]:
    """Mean cosine of the same task, of different tasks, both also without the mean over tasks; ``p``, ``q``: P and Q
    alone.
    """
    out = {}
    for kind, (u, v) in {"p": (ga[..., :-1], gb[..., :-1]), "q": (ga[..., -1:], gb[..., -1:])}.items():
        for mode in ("raw", "centred"):
            x, y = (t.flatten(1) for t in (u, v))
            if mode == "centred":
                x, y = x - x.mean(0), y - y.mean(0)
            c = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
            same = torch.eye(len(c), dtype=torch.bool)
            out[f"{kind} {mode} same"] = round(float(c[same].mean()), 3)
            out[f"{kind} {mode} other"] = round(float(c[~same].mean()), 3)
    return out
