"""Paired second moments of two bodies over public data: inputs of the adapted linears and loss gradients at their
outputs.

Positions are paired: the five visual tokens one to one, text tokens where both tokenizers end a token at the same
character of the same text. The gradient is that of a random contrast of two words at the last position, score(u) -
score(v): words that are one token in both vocabularies (thousands). A loss on captions would span only the few hundred
tokens that captions use, fewer than the width of the models, and the map learned from it would not reach other answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .bodies import Body, attention_mask
from .suite import Public
from .vlm import LENGTH, VISUAL, Projector, sequence

QUESTIONS = (
    "What do you see here? Answer:",
    "Describe it in one word. Answer:",
    "Which group does it belong to? Answer:",
    "Name this. Answer:",
    "What comes to mind? Answer:",
    "Which word fits best? Answer:",
    "How would you label it? Answer:",
    "Sort this picture. Answer:",
    "What sort of picture is this? Answer:",
    "Pick a word. Answer:",
    "Which label is right? Answer:",
    "Say what this shows. Answer:",
)


@dataclass(frozen=True)
class Moments:
    """Per adapted linear: ``aa`` [d_a, d_a], ``bb`` [d_b, d_b], ``ab`` [d_a, d_b] and the means ``ma``, ``mb``;
    float64.
    """

    aa: list[Tensor]
    bb: list[Tensor]
    ab: list[Tensor]
    ma: list[Tensor]
    mb: list[Tensor]


def shared_words(a: Body, b: Body, banned: set[str]) -> list[tuple[str, int, int]]:
    """Lower-case words of at least three letters that are one token (with a leading space) in both vocabularies."""
    va, vb = a.tokenizer.get_vocab(), b.tokenizer.get_vocab()
    out = []
    for t, i in va.items():
        w = t[1:]
        if (
            t[0] == "\u0120"
            and len(w) > 2
            and w.isascii()
            and w.isalpha()
            and w.islower()
            and w not in banned
            and "\u2581" + w in vb
        ):
            out.append((w, i, vb["\u2581" + w]))
    return sorted(out)


def ends(body: Body, text: str) -> list[int]:
    """Character at which each token of the text ends."""
    return [e for _, e in body.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]


def observe(
    body: Body, proj: Projector, x: Tensor, question: str, contrasts: list[Tensor]
) -> tuple[list[Tensor], list[list[Tensor]], list[int]]:
    """Inputs [n, L, d_in] per adapted linear; per contrast ([n, 2] word ids) its gradients [n, L, d_out]; marks of
    positions.
    """
    ids = body.ids(question)
    with torch.no_grad():
        e, valid = sequence(body, proj, x, [ids] * len(x), LENGTH)
        mask = attention_mask(valid)
        h = body.below(e, mask)
    h.requires_grad_(True)
    xs, ys = [], []

    def lin(i: int, role: str, v: Tensor) -> Tensor:
        y = F.linear(v, body.layers[i][role])
        if i in body.targets:
            xs.append(v.detach().float())
            ys.append(y)
        return y

    for i in range(body.start, body.depth):
        h = body.layer(i, h, mask, lin)
    z = h[:, -1].float()
    z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + body.eps) * body.final
    grads = []
    for k, c in enumerate(contrasts):
        w = body.embedding[c].float()
        g = torch.autograd.grad((z * (w[:, 0] - w[:, 1])).sum(), ys, retain_graph=k + 1 < len(contrasts))
        grads.append([v.float() for v in g])
    return xs, grads, [0] * (LENGTH - VISUAL - len(ids)) + [-k - 1 for k in range(VISUAL)] + ends(body, question)


def collect(
    a: Body,
    pa: Projector,
    b: Body,
    pb: Projector,
    public: Public,
    banned: set[str],
    pictures: range,
    repeats: int = 3,
    batch: int = 32,
    seed: int = 0,
) -> tuple[Moments, Moments]:
    """Moments of inputs (centred within question and position) and of output gradients (not centred) over public
    pictures.
    """

    def zeros(k: int) -> Moments:
        sa, sb = [s[k] for s in a.shapes()], [s[k] for s in b.shapes()]
        make = lambda p, q: [torch.zeros(u, v) for u, v in zip(p, q, strict=True)]  # noqa: E731
        return Moments(
            make(sa, sa), make(sb, sb), make(sa, sb), [torch.zeros(u) for u in sa], [torch.zeros(v) for v in sb]
        )

    inputs, outputs, words = zeros(0), zeros(1), shared_words(a, b, banned)
    g, seen = torch.Generator().manual_seed(seed), 0

    def add(store: Moments, j: int, u: Tensor, v: Tensor) -> None:
        store.aa[j] += u.T @ u
        store.bb[j] += v.T @ v
        store.ab[j] += u.T @ v

    starts = [(p, s) for p in range(repeats) for s in range(pictures.start, pictures.stop, batch)]
    table = torch.tensor([[i, j] for _, i, j in words])
    for k, (p, s) in enumerate(starts):
        pick = list(range(s, min(s + batch, pictures.stop)))
        question = QUESTIONS[(k + p) % len(QUESTIONS)]
        draw = torch.randint(len(words), (len(pick), 2), generator=g)
        xa, ga, ma = observe(a, pa, public.x[pick], question, [table[draw, 0]])
        xb, gb, mb = observe(b, pb, public.x[pick], question, [table[draw, 1]])
        place = {c: q for q, c in enumerate(mb) if c}
        ia = [q for q, c in enumerate(ma) if c and c in place]
        ib = [place[ma[q]] for q in ia]
        seen += len(pick)
        for j in range(len(xa)):
            tail = j >= len(xa) - 7 and j % 7 not in (1, 2)  # beyond the last attention only the last position counts
            pa_, pb_ = (ia[-1:], ib[-1:]) if tail else (ia, ib)
            u, v = xa[j][:, pa_], xb[j][:, pb_]
            inputs.ma[j] += u.mean((0, 1)) * len(pick)
            inputs.mb[j] += v.mean((0, 1)) * len(pick)
            # within one question and position: what the picture changes, not which question was asked or where we are
            u, v = (
                (t - t.mean(0)).flatten(0, 1) * (len(pick) / (len(pick) - 1)) ** 0.5 / len(pa_) ** 0.5 for t in (u, v)
            )
            add(inputs, j, u, v)
            add(outputs, j, *((t[0][j][:, q].flatten(0, 1)) for t, q in ((ga, pa_), (gb, pb_))))
    out = []
    for store, n in ((inputs, seen), (outputs, seen)):
        out.append(Moments(*([t.double() / n for t in x] for x in (store.aa, store.bb, store.ab, store.ma, store.mb))))
    print(f"{seen} pictures with a question, as many contrasts of {len(words)} shared words", flush=True)
    return out[0], out[1]
