"""Many adapter runs side by side: scores, AdamW by hand (a learning rate per run), evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .bodies import Body, Factors, Maps, attention_mask
from .suite import Task
from .vlm import Projector, task_hidden

CHOICES = 5  # answers per task, padded


@dataclass
class Arch:
    """One architecture with its projector and the cached states of every task."""

    name: str
    body: Body
    projector: Projector
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    prior: dict[str, Tensor] = field(default_factory=dict)
    score = None

    def add(self, task: Task, file: Path | None = None) -> None:
        """Cache the states of a task (on disk too, if a file is named)."""
        if file is not None and file.exists():
            s = torch.load(file)
        else:
            s = task_hidden(self.body, self.projector, task)
            if file is not None:
                torch.save(s, file)
        self.states[task.name] = s
        self.masks[task.name] = attention_mask(s["valid"][None])[0]
        rows = self.body.first_tokens(task.answers)
        self.rows[task.name] = torch.tensor(rows + [-1] * (CHOICES - len(rows)))
        if "prior" not in s:
            s["prior"] = self._prior(task.name)
            if file is not None:
                torch.save(s, file)
        self.prior[task.name] = s["prior"]

    @torch.no_grad()
    def _prior(self, name: str, n: int = 64) -> Tensor:
        """The frozen body's mean score of each answer over unlabelled pictures, taken off everywhere.

        A truncated body prefers an answer whatever it sees (loss 2.2 to 2.7 where guessing costs 1.4), each body
        another one. Left in, that preference is most of what P and Q learn at first, and it means nothing to another
        body.
        """
        h = self.states[name]["train"][:n]
        x = self.body.above(h, self.masks[name][None].expand(len(h), -1, -1), self.body.plain)
        return (x @ self.body.embedding[self.rows[name].clamp_min(0)].float().T).mean(0)


def load_arch(raw: Path, cache: Path, name: str, depth: int, tasks: dict[str, Task], blocks: int = 2) -> Arch:
    """Body, pre-trained projector and cached states."""
    body = Body(raw / name, depth, blocks)
    proj = Projector(body.width, body.rms)
    proj.load_state_dict(torch.load(cache / f"projector_{name}_{depth}.pt"))
    arch = Arch(name, body, proj.eval().requires_grad_(False))
    with torch.no_grad():
        for t in tasks.values():
            arch.add(t, cache / f"states_{name}_{depth}_{blocks}_{t.name.replace('/', '_')}.pt")
    return arch


def scores(arch: Arch, h: Tensor, mask: Tensor, rows: Tensor, prior: Tensor, factors: Factors, maps: Maps) -> Tensor:
    """[R, b, CHOICES] float32 with -1e9 where a task has fewer answers; h [R, b, T, d], mask [R, T, T]."""
    R, b = h.shape[:2]
    m = mask[:, None].expand(R, b, *mask.shape[1:]).reshape(R * b, *mask.shape[1:])
    z = (arch.score or arch.body.logits)(h.reshape(R * b, *h.shape[2:]), m, rows.clamp_min(0), factors, maps)
    return (z - prior[:, None]).masked_fill((rows < 0)[:, None], -1e9)


@torch.no_grad()
def own_offsets(arch: Arch, tasks: list[Task], factors: Factors, n: int, start: int = 0) -> list[Tensor]:
    """c [R, r] per adapted linear: the mean of A x over the run's own unlabelled pictures."""
    kept: list[list[Tensor]] = []

    def lin(i: int, role: str, x: Tensor) -> Tensor:
        if i in arch.body.targets:
            kept[-1].append(x.float())
        return F.linear(x, arch.body.layers[i][role])

    for t in tasks:
        kept.append([])
        h, valid = arch.states[t.name]["train"][start : start + n], arch.states[t.name]["valid"]
        arch.body.above(h, arch.masks[t.name][None].expand(len(h), -1, -1), lin)
        kept[-1] = [(x[:, valid] if x.shape[1] > 1 else x).mean((0, 1)) for x in kept[-1]]
    return [torch.stack([k[j] for k in kept]) @ a.T for j, a in enumerate(factors.A)]


class AdamW:
    """AdamW over stacked runs; ``lr`` broadcasts against the leading dimensions of each tensor."""

    def __init__(self, params: list[Tensor], lr: Tensor) -> None:
        self.params, self.lr, self.t = params, lr, 0
        self.m = [torch.zeros_like(p) for p in params]
        self.v = [torch.zeros_like(p) for p in params]

    def step(self, grads: list[Tensor], factor: float) -> None:
        """One step with the learning rate times ``factor``."""
        self.t += 1
        with torch.no_grad():
            for p, g, m, v in zip(self.params, grads, self.m, self.v, strict=True):
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                up = (m / (1 - 0.9**self.t)) / ((v / (1 - 0.999**self.t)).sqrt() + 1e-8)
                p -= self.lr.view(*self.lr.shape, *[1] * (p.dim() - self.lr.dim())) * factor * up


def ramp(step: int, total: int, warm: int = 10) -> float:
    """Linear warm-up, then cosine to a tenth."""
    if step < warm:
        return (step + 1) / warm
    x = (step - warm) / max(1, total - warm)
    return 0.1 + 0.9 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * x)).item())


def zeros(arch: Arch, *lead: int, rank: int = 16) -> tuple[Tensor, Tensor]:
    """P [*lead, J, r, r] and Q [*lead, J, r] at zero."""
    J = len(arch.body.shapes())
    return torch.zeros(*lead, J, rank, rank), torch.zeros(*lead, J, rank)


def batches(n: int, batch: int, steps: int, seed: int) -> Tensor:
    """[steps, batch] indices: one shuffled pass after the other."""
    g, out = torch.Generator().manual_seed(seed), []
    while sum(map(len, out)) < steps * batch:
        out.append(torch.randperm(n, generator=g))
    return torch.cat(out)[: steps * batch].view(steps, batch)


@torch.no_grad()
def evaluate(arch: Arch, tasks: list[Task], side: str, n: int, factors: Factors, maps: Maps, batch: int = 8) -> Tensor:
    """Each run on its own task's first ``n`` samples of a side: [R, 2] accuracy and mean log-likelihood."""
    hit, ll, seen = torch.zeros(len(tasks)), torch.zeros(len(tasks)), 0
    mask = torch.stack([arch.masks[t.name] for t in tasks])
    rows = torch.stack([arch.rows[t.name] for t in tasks])
    prior = torch.stack([arch.prior[t.name] for t in tasks])
    for s in range(0, n - batch + 1, batch):
        h = torch.stack([arch.states[t.name][side][s : s + batch] for t in tasks])
        y = torch.stack([t.y[side][s : s + batch] for t in tasks])
        z = scores(arch, h, mask, rows, prior, factors, maps).log_softmax(-1)
        hit += (z.argmax(-1) == y).float().sum(1)
        ll += z.gather(-1, y[..., None])[..., 0].sum(1)
        seen += batch
    return torch.stack([hit / seen, ll / seen], 1)


def fit(
    arch: Arch,
    tasks: list[Task],
    n: int,
    steps: int,
    factors: Factors,
    lr: Tensor,
    seed: int,
    offset: int = 0,
    batch: int = 8,
) -> Maps:
    """Independent training of one run per task on samples [offset, offset + n) of its train side; lr [R]."""
    P, Q = zeros(arch, len(tasks))
    P.requires_grad_(True), Q.requires_grad_(True)
    opt, order = AdamW([P, Q], lr), batches(n, batch, steps, seed)
    mask = torch.stack([arch.masks[t.name] for t in tasks])
    rows = torch.stack([arch.rows[t.name] for t in tasks])
    prior = torch.stack([arch.prior[t.name] for t in tasks])
    for step in range(steps):
        i = order[step] + offset
        h = torch.stack([arch.states[t.name]["train"][i] for t in tasks])
        y = torch.stack([t.y["train"][i] for t in tasks])
        z = scores(arch, h, mask, rows, prior, factors, Maps(P, Q))
        loss = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(len(tasks), -1).mean(1).sum()
        opt.step(list(torch.autograd.grad(loss, [P, Q])), ramp(step, steps))
    return Maps(P.detach(), Q.detach())
