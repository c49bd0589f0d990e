"""Truncated real language models by hand, for many adapter runs at once.

One forward serves R runs (clients, seeds, methods) of one architecture: the frozen bf16 products are shared, each run
brings its own rank-space map P [J, r, r], Q [J, r] for the J = blocks x 7 adapted linears. Everything below the first
adapted layer is computed once and cached; the last layer after its keys and values sees the last position only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def block_last(depth: int, blocks: int) -> list[int]:
    """Zero-based block-last layers: k * floor(depth / blocks) - 1, the last block takes the remainder."""
    step = depth // blocks
    return [k * step - 1 for k in range(1, blocks)] + [depth - 1]


@dataclass(frozen=True)
class Factors:
    """Frozen A [r, d_in], offsets c [r] and B [d_out, r] of the J adapted linears, float32, and the scale s = alpha /
    r.

    Rank space is z = A x - c. Two models agree on how z varies, never on A's image of their mean activation, which is
    the larger part: without the offset a P learned on one model meets another constant in the other. ``c`` is [r], or
    [R, r] where every run has its own.
    """

    A: list[Tensor]
    B: list[Tensor]
    c: list[Tensor]
    scale: float = 2.0


@dataclass
class Maps:
    """Rank-space maps of R runs: P [R, J, r, r] (column convention), Q [R, J, r]."""

    P: Tensor
    Q: Tensor


class Body:
    """Frozen truncated causal LM: ``family`` is "llama" or "gemma3"."""

    def __init__(self, path: Path, depth: int, blocks: int = 2) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        cfg, m = lm.config, lm.model
        self.gemma = cfg.model_type.startswith("gemma3")
        self.depth, self.targets = depth, block_last(depth, blocks)
        self.start = self.targets[0]
        self.width, self.heads, self.kv = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads
        self.head_dim = getattr(cfg, "head_dim", None) or self.width // self.heads
        self.eps = cfg.rms_norm_eps
        self.plus = 1.0 if self.gemma else 0.0
        self.embedding = m.embed_tokens.weight.detach()
        self.embed_scale = torch.tensor(self.width**0.5 if self.gemma else 1.0).to(torch.bfloat16)
        self.final = m.norm.weight.detach().float() + self.plus
        self.layers = []
        for layer in m.layers[:depth]:
            w = {f"{k}": getattr(layer.self_attn, f"{k}_proj").weight.detach() for k in ("q", "k", "v", "o")}
            w |= {k: getattr(layer.mlp, f"{k}_proj").weight.detach() for k in ("gate", "up", "down")}
            names = {"n1": "input_layernorm", "n2": "post_attention_layernorm"}
            if self.gemma:
                names |= {"n3": "pre_feedforward_layernorm", "n4": "post_feedforward_layernorm"}
                w |= {
                    "qn": layer.self_attn.q_norm.weight.detach().float() + 1,
                    "kn": layer.self_attn.k_norm.weight.detach().float() + 1,
                }
            w |= {k: getattr(layer, v).weight.detach().float() + self.plus for k, v in names.items()}
            self.layers.append(w)
        if self.gemma:
            kinds, rp = cfg.layer_types, cfg.rope_parameters
            self.theta = [rp[kinds[i]]["rope_theta"] for i in range(depth)]
        else:
            self.theta = [cfg.rope_parameters["rope_theta"]] * depth
        self.rms = float(self.embed(torch.arange(1000, 9000)).float().pow(2).mean().sqrt())

    def shapes(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of the adapted linears, in the order (block, role)."""
        return [(self.layers[i][k].shape[1], self.layers[i][k].shape[0]) for i in self.targets for k in ROLES]

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings as the model feeds them, bf16."""
        return self.embedding[ids] * self.embed_scale

    def ids(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def first_tokens(self, words: tuple[str, ...]) -> list[int]:
        """The first token of each answer (with its leading space); they must differ."""
        out = [self.ids(" " + w)[0] for w in words]
        if len(set(out)) != len(out):
            raise ValueError(f"answers {words} share a first token")
        return out

    def _norm(self, x: Tensor, w: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps) * w).to(torch.bfloat16)

    def _rope(self, i: int, T: int) -> tuple[Tensor, Tensor]:
        f = 1.0 / self.theta[i] ** (torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim)
        e = torch.outer(torch.arange(T, dtype=torch.float32), f)
        e = torch.cat((e, e), -1)
        return e.cos().to(torch.bfloat16), e.sin().to(torch.bfloat16)

    def layer(self, i: int, h: Tensor, mask: Tensor, lin, last: bool = False) -> Tensor:
        """One layer; ``lin(layer, role, x)`` computes a linear. ``last`` keeps the last position only."""
        w, (N, T, _) = self.layers[i], h.shape
        x = self._norm(h, w["n1"])
        xq = x[:, -1:] if last else x
        Tq = xq.shape[1]
        q = lin(i, "q", xq).view(N, Tq, self.heads, self.head_dim).transpose(1, 2)
        k = lin(i, "k", x).view(N, T, self.kv, self.head_dim).transpose(1, 2)
        v = lin(i, "v", x).view(N, T, self.kv, self.head_dim).transpose(1, 2)
        if self.gemma:
            q, k = self._norm(q, w["qn"]), self._norm(k, w["kn"])
        cos, sin = self._rope(i, T)
        half = self.head_dim // 2
        rot = lambda y: torch.cat((-y[..., half:], y[..., :half]), -1)  # noqa: E731
        q, k = q * cos[T - Tq :] + rot(q) * sin[T - Tq :], k * cos + rot(k) * sin
        n, scale = self.heads // self.kv, 256**-0.5 if self.gemma else self.head_dim**-0.5
        q = q.float().reshape(N * self.kv, n * Tq, self.head_dim)  # query heads that share keys, one after the other
        k, v = (y.float().reshape(N * self.kv, T, self.head_dim) for y in (k, v))
        score = torch.bmm(q, k.transpose(1, 2)).view(N, self.kv, n, Tq, T) * scale + mask[:, None, None, T - Tq :]
        a = torch.bmm(score.softmax(-1).view(N * self.kv, n * Tq, T), v)
        a = a.view(N, self.heads, Tq, self.head_dim).to(torch.bfloat16)
        a = lin(i, "o", a.transpose(1, 2).reshape(N, Tq, -1))
        h = h[:, -1:] if last else h
        if self.gemma:
            h = h + self._norm(a, w["n2"])
            x = self._norm(h, w["n3"])
            m = lin(i, "down", F.gelu(lin(i, "gate", x), approximate="tanh") * lin(i, "up", x))
            return h + self._norm(m, w["n4"])
        h = h + a
        x = self._norm(h, w["n2"])
        return h + lin(i, "down", F.silu(lin(i, "gate", x)) * lin(i, "up", x))

    def plain(self, i: int, role: str, x: Tensor) -> Tensor:
        """The frozen product."""
        return F.linear(x, self.layers[i][role])

    def below(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Hidden states that enter the first adapted layer."""
        h = embeds
        for i in range(self.start):
            h = self.layer(i, h, mask, self.plain)
        return h

    def above(self, h: Tensor, mask: Tensor, lin) -> Tensor:
        """Normed last-position state [N, d] float32 from the cached hidden states."""
        for i in range(self.start, self.depth):
            h = self.layer(i, h, mask, lin, last=i == self.depth - 1)
        x = h[:, -1].float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.final

    def adapted(self, factors: Factors, maps: Maps):
        """A ``lin`` in which run k's rows go through B (P_k A x + Q_k)."""
        index = {(i, k): j * len(ROLES) + m for j, i in enumerate(self.targets) for m, k in enumerate(ROLES)}
        R = maps.P.shape[0]

        def lin(i: int, role: str, x: Tensor) -> Tensor:
            y = F.linear(x, self.layers[i][role])
            j = index.get((i, role))
            if j is None:
                return y
            N, T, _ = x.shape
            c = factors.c[j]
            z = F.linear(x.float(), factors.A[j]).view(R, -1, factors.A[j].shape[0]) - (
                c if c.dim() == 1 else c[:, None]
            )
            u = torch.baddbmm(maps.Q[:, j, None], z, maps.P[:, j].transpose(1, 2))
            return y + (factors.scale * F.linear(u, factors.B[j])).view(N, T, -1).to(y.dtype)

        return lin

    def logits(self, h: Tensor, mask: Tensor, rows: Tensor, factors: Factors, maps: Maps) -> Tensor:
        """Scores of each run's candidate tokens: rows [R, C] -> [R, N / R, C] float32."""
        R = rows.shape[0]
        x = self.above(h, mask, self.adapted(factors, maps))
        return torch.bmm(x.view(R, -1, self.width), self.embedding[rows].float().transpose(1, 2))


def attention_mask(valid: Tensor) -> Tensor:
    """[N, T, T] float32, 0 or -1e9: causal, padded keys hidden (a padded query still sees itself)."""
    T = valid.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    seen = (causal & valid[:, None, :]) | torch.eye(T, dtype=torch.bool)
    return torch.zeros(seen.shape).masked_fill_(~seen, -1e9)


def random_factors(shapes: list[tuple[int, int]], rank: int, seed: int) -> Factors:
    """Row-orthonormal A and column-orthonormal B, as in the paper, scaled so that z has the RMS of x's entries."""
    g = torch.Generator().manual_seed(seed)
    A = [torch.linalg.qr(torch.randn(d, rank, generator=g))[0].T.contiguous() for d, _ in shapes]
    B = [torch.linalg.qr(torch.randn(o, rank, generator=g))[0].contiguous() for _, o in shapes]
    return Factors(A, B, [torch.zeros(rank) for _ in A])
