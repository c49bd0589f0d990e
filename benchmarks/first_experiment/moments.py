"""Paired second moments of two bodies over public data: inputs of the adapted linears and loss gradients at their outputs.

Positions are paired: the five visual tokens one to one, text tokens where both tokenizers end a token at the same
character of the same text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .bodies import Body, attention_mask
from .suite import Public
from .vlm import VISUAL, Projector, caption, prefix, sequence

QUESTION = "What is in this picture? Answer:"


@dataclass(frozen=True)
class Moments:
    """Per adapted linear, centred: ``aa`` [d_a, d_a], ``bb`` [d_b, d_b], ``ab`` [d_a, d_b]; float64."""

    aa: list[Tensor]
    bb: list[Tensor]
    ab: list[Tensor]


def ends(body: Body, text: str) -> list[int]:
    """Character at which each token of the text ends."""
    enc = body.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [e for _, e in enc["offset_mapping"]]


def observe(body: Body, proj: Projector, x: Tensor, questions: list[str], answers: list[str]) -> tuple[list[Tensor], list[Tensor], list[list[int]]]:
    """Inputs [n, L, d_in] and output gradients [n, L, d_out] per adapted linear, and per example the paired character ends.

    Position p of a row is described by ``-k`` for the k-th visual token, by the end character for text, 0 for padding.
    """
    text = [q + a for q, a in zip(questions, answers, strict=True)]
    ids = [body.ids(t) for t in text]
    length = max(map(len, ids)) + VISUAL + len(prefix(body))
    with torch.no_grad():
        e, valid = sequence(body, proj, x, ids, length)
        mask = attention_mask(valid)
        h = body.below(e, mask)
    h.requires_grad_(True)
    xs, ys = [], []

    def lin(i: int, role: str, v: Tensor) -> Tensor:
        y = F.linear(v, body.layers[i][role])
        if i in body.targets:
            xs.append(v)
            ys.append(y)
        return y

    for i in range(body.start, body.depth):
        h = body.layer(i, h, mask, lin)
    z = h.float()
    z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + body.eps) * body.final
    vocab = sorted({t for r in ids for t in r})
    where, rows = {t: i for i, t in enumerate(vocab)}, body.embedding[torch.tensor(vocab)].float()
    marks, loss = [], torch.zeros(())
    for r, (row, t, q) in enumerate(zip(ids, text, questions, strict=True)):
        end = ends(body, t)
        marks.append([0] * (length - VISUAL - len(row)) + [-k - 1 for k in range(VISUAL)] + end)
        first = next(k for k, c in enumerate(end) if c > len(q))
        pos = length - len(row) + torch.arange(first, len(row)) - 1
        loss = loss + F.cross_entropy(z[r, pos] @ rows.T, torch.tensor([where[t] for t in row[first:]]))
    grads = torch.autograd.grad(loss, ys)
    order = [k for _ in body.targets for k in (0, 1, 2, 3, 4, 5, 6)]
    assert len(order) == len(xs)
    return [v.detach().float() for v in xs], [g.float() for g in grads], marks


def collect(a: Body, pa: Projector, b: Body, pb: Projector, public: Public, n: int = 512, batch: int = 16) -> tuple[Moments, Moments]:
    """Moments of inputs and of output gradients over ``n`` public pictures with their captions."""
    def zeros(k: int) -> Moments:
        sa, sb = [s[k] for s in a.shapes()], [s[k] for s in b.shapes()]
        make = lambda p, q: [torch.zeros(u, v, dtype=torch.float64) for u, v in zip(p, q, strict=True)]  # noqa: E731
        return Moments(make(sa, sa), make(sb, sb), make(sa, sb))

    inputs, outputs = zeros(0), zeros(1)
    sums = [[torch.zeros(s[k], dtype=torch.float64) for s in m.shapes()] for m in (a, b) for k in (0, 1)]
    count = 0
    for s in range(0, n, batch):
        pick = list(range(s, min(s + batch, n)))
        q, ans = [QUESTION] * len(pick), [caption(public, i) for i in pick]
        xa, ga, ma = observe(a, pa, public.x[pick], q, ans)
        xb, gb, mb = observe(b, pb, public.x[pick], q, ans)
        ia, ib = [], []
        for r, (u, v) in enumerate(zip(ma, mb, strict=True)):
            place = {c: p for p, c in enumerate(v) if c}
            for p, c in enumerate(u):
                if c and c in place:
                    ia.append(r * len(u) + p)
                    ib.append(r * len(v) + place[c])
        count += len(ia)
        for store, sa, sb, va, vb in ((inputs, sums[0], sums[2], xa, xb), (outputs, sums[1], sums[3], ga, gb)):
            for j in range(len(va)):
                u, v = va[j].flatten(0, 1)[ia], vb[j].flatten(0, 1)[ib]
                store.aa[j] += (u.T @ u).double()
                store.bb[j] += (v.T @ v).double()
                store.ab[j] += (u.T @ v).double()
                sa[j] += u.sum(0).double()
                sb[j] += v.sum(0).double()
    for j in range(len(inputs.aa)):  # inputs are centred, gradients are not (their mean is signal)
        ua, ub = sums[0][j] / count, sums[2][j] / count
        inputs.aa[j] -= count * torch.outer(ua, ua)
        inputs.bb[j] -= count * torch.outer(ub, ub)
        inputs.ab[j] -= count * torch.outer(ua, ub)
    for m in (inputs, outputs):
        for t in (*m.aa, *m.bb, *m.ab):
            t /= count
    print(f"{count} paired positions", flush=True)
    return inputs, outputs
