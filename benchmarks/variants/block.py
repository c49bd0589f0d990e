"""The last layer of a language model, frozen, under many adapters at once.

Only the position that answers leaves the last layer, so its queries, output projection and perceptron are computed
there alone; what does not depend on an adapter is computed once per example (`Block.prefix`). Fifty adapters then cost
what fifty rows of a matrix product cost, which is what lets one machine compare methods over seeds. `python -m
benchmarks.variants check` compares the scores with those of the package's own layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True, eq=False)
class Prefix:
    """Examples of one task as the last layer takes them: what no adapter changes, float32.

    Attributes:
        residual: ``[n, d]``, what entered the layer at the last position.
        q: ``[n, d_q]`` and its rank coordinates ``z_q [n, r]``, at the last position.
        k: ``[n, t, d_kv]`` and ``z_k [n, t, r]``; v likewise.
        rows: ``[c, d]``, the head's rows of the answers.
        answer: ``[n]``, index of the right one.
    """

    residual: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    z_q: Tensor
    z_k: Tensor
    z_v: Tensor
    rows: Tensor
    answer: Tensor

    def __len__(self) -> int:
        return len(self.answer)

    def take(self, index: Tensor | slice) -> Prefix:
        """Some of the examples."""
        per_example = (self.residual, self.q, self.k, self.v, self.z_q, self.z_k, self.z_v)
        return Prefix(*(tensor[index] for tensor in per_example), self.rows, self.answer[index])


class Block:
    """The last layer of a Llama- or Gemma-3-like model in float32, with the frozen bases of its adapters.

    Args:
        model: a causal language model of transformers.
        bases: A ``[r, d_in]`` and B ``[d_out, r]`` per role.
        scale: alpha / r.
    """

    def __init__(self, model: Any, bases: dict[str, tuple[Tensor, Tensor]], scale: float) -> None:
        body = model.model
        self._layer, self._norm = body.layers[-1].float(), body.norm.float()
        self._head = model.get_output_embeddings().weight
        attention, mlp = self._layer.self_attn, self._layer.mlp
        self._linear: dict[str, nn.Linear] = {
            "q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj, "o": attention.o_proj,
            "gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj,
        }  # fmt: skip
        self._A = {role: bases[role][0].float() for role in ROLES}
        self._BT = {role: scale * bases[role][1].float().T.contiguous() for role in ROLES}
        self._head_dim, self._scaling = attention.head_dim, attention.scaling
        kind = getattr(attention, "layer_type", None)
        self._rotary = lambda x, at: body.rotary_emb(x, at, kind) if kind else body.rotary_emb(x, at)
        self._four_norms = hasattr(self._layer, "pre_feedforward_layernorm")
        self.rank = len(self._A["q"])

    @torch.no_grad()
    def prefix(self, states: Tensor, options: Tensor, answer: Tensor) -> Prefix:
        """Of states that enter the layer ``[n, t, d]``, tokens of the answers ``[c]`` and the right ones ``[n]``."""
        x = self._layer.input_layernorm(states.float())
        last = x[:, -1]
        return Prefix(
            states[:, -1].float(), self._linear["q"](last), self._linear["k"](x), self._linear["v"](x),
            F.linear(last, self._A["q"]), F.linear(x, self._A["k"]), F.linear(x, self._A["v"]),
            self._head[options].float(), answer,
        )  # fmt: skip

    def logits(self, x: Prefix, P: Tensor, Q: Tensor) -> Tensor:
        """Scores of the answers ``[m, n, c]`` under m adapters P ``[m, 7, r, r]``, Q ``[m, 7, r]``."""
        m, (n, t) = len(P), x.z_k.shape[:2]

        def added(role: str, z: Tensor) -> Tensor:
            index = ROLES.index(role)
            return (z @ P[:, index].transpose(1, 2) + Q[:, index, None]) @ self._BT[role]

        def adapted(role: str, inputs: Tensor) -> Tensor:
            return self._linear[role](inputs) + added(role, F.linear(inputs, self._A[role]))

        q = x.q + added("q", x.z_q[None])
        k = (x.k.flatten(0, 1) + added("k", x.z_k.flatten(0, 1)[None])).view(m, n, t, -1, self._head_dim)
        v = (x.v.flatten(0, 1) + added("v", x.z_v.flatten(0, 1)[None])).view(m, n, t, -1, self._head_dim)
        q = q.view(m, n, k.shape[3], -1, self._head_dim)
        if self._four_norms:
            q, k = self._layer.self_attn.q_norm(q), self._layer.self_attn.k_norm(k)
        cos, sin = (part[0] for part in self._rotary(x.residual, torch.arange(t)[None]))
        q = q * cos[-1] + _rotated(q) * sin[-1]
        k = k * cos[:, None] + _rotated(k) * sin[:, None]
        weights = (torch.einsum("mnhgd,mnthd->mnhgt", q, k) * self._scaling).softmax(-1)
        mixed = torch.einsum("mnhgt,mnthd->mnhgd", weights, v).flatten(2)
        after = adapted("o", mixed)
        h = x.residual + (self._layer.post_attention_layernorm(after) if self._four_norms else after)
        inner = self._layer.pre_feedforward_layernorm if self._four_norms else self._layer.post_attention_layernorm
        y = inner(h)
        out = adapted("down", self._layer.mlp.act_fn(adapted("gate", y)) * adapted("up", y))
        h = h + (self._layer.post_feedforward_layernorm(out) if self._four_norms else out)
        return self._norm(h) @ x.rows.T


def _rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
