"""Joint alignment: the transfer test itself, optimised on public pictures.

Pseudo-tasks are drawn without private labels: a random linear teacher on the public visual tokens, or a random choice
of public caption groups, answered by random words after a random question. Each pseudo-task's P, Q is trained by ONE
of the two models (alternating) and read by both; A and B of both models learn to make the loss of both small. Tasks
are replaced at intervals (P, Q back to zero), so that A and B serve the whole way from zero.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .bodies import Factors, Maps, attention_mask
from .engine import CHOICES, AdamW, Arch, zeros
from .moments import QUESTIONS, shared_words
from .suite import Public
from .vlm import LENGTH, sequence


@dataclass
class Pseudo:
    """One pseudo-task: question, answer words, the public pictures in use and their answers."""

    question: str
    words: tuple[str, ...]
    index: list[int]
    answer: Tensor


def sampler(public: Public, words: list[str], rng: random.Random):
    """A function that draws pseudo-tasks answered by ``words``."""
    flat = public.x.float().flatten(1)
    flat = (flat - flat.mean(0)) / flat.std(0).clamp_min(1e-6)
    _, _, V = torch.pca_lowrank(flat, 48)
    pcs = flat @ V
    pcs = pcs / pcs.std(0)
    groups: dict[str, list[int]] = {}
    for i, g in enumerate(public.groups):
        groups.setdefault(g, []).append(i)
    large = [g for g, v in groups.items() if len(v) >= 24]

    def draw() -> Pseudo:
        C = rng.choice((3, 4, 4, 5))
        g = torch.Generator().manual_seed(rng.getrandbits(30))
        if rng.random() < 0.5:
            d = rng.choice((4, 12, 48))
            z = pcs[:, :d] @ torch.randn(d, C, generator=g)
            z = z - z.mean(0)
            y = z.argmax(1)
            keep = (z.max(1).values - z.topk(2).values[:, 1] > 0.3).nonzero()[:, 0].tolist()
        else:
            y, keep = torch.full((len(public.x),), -1), []
            pick = rng.sample(large, C)
            for c, name in enumerate(pick):
                y[groups[name]] = c
                keep += groups[name]
        by = [[i for i in keep if y[i] == c] for c in range(C)]
        n = 24
        index = [i for b in by if b for i in rng.sample(b, min(n, len(b)))]
        rng.shuffle(index)
        return Pseudo(rng.choice(QUESTIONS), tuple(rng.sample(words, C)), index, y[index])

    return draw


def _cached(arch: Arch, public: Public, t: Pseudo) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States [n, L, d], mask [L, L], candidate rows and the body's prior over them, of a pseudo-task for one
    architecture.
    """
    ids = arch.body.ids(t.question)
    with torch.no_grad():
        e, valid = sequence(arch.body, arch.projector, public.x[t.index], [ids] * len(t.index), LENGTH)
        mask = attention_mask(valid)
        h = arch.body.below(e, mask)
        rows = [arch.body.ids(" " + w)[0] for w in t.words]
        rows = torch.tensor(rows + [-1] * (CHOICES - len(rows)))
        x = arch.body.above(h[:32], mask[:32], arch.body.plain)
        prior = (x @ arch.body.embedding[rows.clamp_min(0)].float().T).mean(0)
    return h, mask[0], rows, prior


def joint(
    a: Arch,
    b: Arch,
    fa: Factors,
    fb: Factors,
    public: Public,
    banned: set[str],
    *,
    steps: int = 300,
    tasks: int = 8,
    life: int = 60,
    batch: int = 8,
    lr_ab: float = 2e-3,
    lr_pq: float = 1e-2,
    train_anchor: bool = True,
    both: bool = False,
    seed: int = 0,
) -> tuple[Factors, Factors]:
    """Learn A, B of both models (``train_anchor=False``: the student only); ``both``: P, Q trained by both models."""
    rng = random.Random(f"joint/{seed}")
    draw = sampler(public, [w for w, _, _ in shared_words(a.body, b.body, banned)], rng)
    ok = lambda t: all(len({m.body.ids(" " + w)[0] for w in t.words}) == len(t.words) for m in (a, b))  # noqa: E731

    def fresh() -> Pseudo:
        while True:
            t = draw()
            if ok(t) and len(t.index) >= 2 * batch:
                return t

    fs = [
        Factors(
            [x.clone().requires_grad_(m or train_anchor) for x in f.A],
            [x.clone().requires_grad_(m or train_anchor) for x in f.B],
            f.c,
            f.scale,
        )
        for m, f in ((False, fa), (True, fb))
    ]
    ab = [x for f in fs for x in (*f.A, *f.B) if x.requires_grad]
    rel = [float(x.detach().pow(2).mean().sqrt()) for x in ab]  # a step is relative to the tensor's own size
    opts = [AdamW([x], torch.tensor(lr_ab * r)) for x, r in zip(ab, rel, strict=True)]
    P, Q = zeros(a, tasks)
    P.requires_grad_(True), Q.requires_grad_(True)
    opt = AdamW([P, Q], torch.full((tasks,), lr_pq))
    ages = [life * k // tasks for k in range(tasks)]
    live = [fresh() for _ in range(tasks)]
    data = [[_cached(m, public, t) for t in live] for m in (a, b)]
    show = torch.zeros(2, 2)
    for step in range(steps):
        for k in range(tasks):
            ages[k] += 1
            if ages[k] > life:
                ages[k], live[k] = 0, fresh()
                for m, arch in enumerate((a, b)):
                    data[m][k] = _cached(arch, public, live[k])
                with torch.no_grad():
                    for x in (P, Q, *opt.m, *opt.v):
                        x[k] = 0
        idx = [torch.randint(len(t.index), (batch,)).tolist() for t in live]
        y = torch.stack([t.answer[i] for t, i in zip(live, idx, strict=True)])
        total, pq = torch.zeros(()), [torch.zeros_like(P), torch.zeros_like(Q)]
        for m, arch in enumerate((a, b)):
            h = torch.stack([data[m][k][0][i] for k, i in enumerate(idx)])
            mask, rows = torch.stack([d[1] for d in data[m]]), torch.stack([d[2] for d in data[m]])
            R = len(live)
            mm = mask[:, None].expand(R, batch, *mask.shape[1:]).reshape(R * batch, *mask.shape[1:])
            z = arch.body.logits(h.reshape(R * batch, *h.shape[2:]), mm, rows.clamp_min(0), fs[m], Maps(P, Q))
            z = (z - torch.stack([d[3] for d in data[m]])[:, None]).masked_fill((rows < 0)[:, None], -1e9)
            ce = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(R, batch).mean(1)
            mine = [x for x in (*fs[m].A, *fs[m].B) if x.requires_grad]
            grads = torch.autograd.grad(ce.sum(), [P, Q, *mine])
            own = torch.tensor([both or k % 2 == m for k in range(R)])
            for x, g in zip(pq, grads[:2], strict=True):
                x += g * own.view(-1, *[1] * (g.dim() - 1))
            for x, g in zip(mine, grads[2:], strict=True):
                x.grad = g / R
            show[m] = 0.95 * show[m] + 0.05 * torch.stack([ce.detach()[own].mean(), ce.detach()[~own].mean()])
            total = total + ce.detach().mean()
        f = min(1.0, (step + 1) / 20) * (0.1 + 0.9 * (1 - step / steps))
        for x, o in zip(ab, opts, strict=True):
            o.step([x.grad], f)
        opt.step(pq, 1.0)
        if step % 25 == 24:
            w = 1 - 0.95 ** (step + 1)
            print(
                f"joint {step + 1}: own and other loss of a, of b", [round(float(x), 3) for x in (show / w).flatten()]
            )
    # the offsets stay those of the start: A moves little, and what is left of the mean is the same in every task
    done = [Factors([x.detach() for x in f.A], [x.detach() for x in f.B], f.c, f.scale) for f in fs]
    return done[0], done[1]
