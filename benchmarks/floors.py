"""Floors of the design on this machine: what a one-step Trainer.fit costs, whether threads change bits, whether the
closed form holds.

Run: ``python benchmarks/floors.py [--gemma DIR]``. Without DIR the Gemma-3 check uses a small random model.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Small(L.LightningModule):
    """A linear classifier: the step itself costs nothing, what is left is the trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(32, 4)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit_cost(repeats: int = 20) -> tuple[float, float]:
    """Milliseconds of one Trainer.fit of one step, and of the same step in a bare loop (medians)."""
    data = DataLoader(TensorDataset(torch.randn(8, 32), torch.randint(4, (8,))), batch_size=8)
    module, fit, bare = Small(), [], []
    torch.set_num_threads(1)
    for _ in range(repeats):
        t = time.perf_counter()
        L.Trainer(
            max_steps=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, data)
        fit.append(time.perf_counter() - t)
        t = time.perf_counter()
        opt = module.configure_optimizers()
        for batch in data:
            opt.zero_grad()
            module.training_step(batch, 0).backward()
            opt.step()
        bare.append(time.perf_counter() - t)
    return 1e3 * sorted(fit)[repeats // 2], 1e3 * sorted(bare)[repeats // 2]


def threads_change_bits(dtype: torch.dtype, steps: int = 5) -> tuple[bool, float]:
    """Whether a two-layer network trained with 1 and with 2 torch threads ends with the same bits; largest
    difference.
    """
    ends, before = [], torch.get_num_threads()
    for n in (1, 2):
        torch.set_num_threads(n)
        g = torch.Generator().manual_seed(0)
        net = nn.Sequential(nn.Linear(576, 1536), nn.GELU(), nn.Linear(1536, 576)).to(dtype)
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.03)
        x = torch.randn(128, 576, generator=g).to(dtype)
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(steps):
            opt.zero_grad()
            net(x).float().pow(2).mean().backward()
            opt.step()
        ends.append(torch.cat([p.detach().float().flatten() for p in net.parameters()]))
    torch.set_num_threads(before)
    return bool(torch.equal(*ends)), float((ends[0] - ends[1]).abs().max())


def _unnorm(a: Tensor, h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Vector-Jacobian product of RMSNorm(h) * weight: rows v^-1/2 (w a - h <w a, h> / (v d))."""
    v = h.pow(2).mean(-1, keepdim=True) + eps
    wa = weight * a
    return v.rsqrt() * (wa - h * (wa * h).sum(-1, keepdim=True) / (v * h.shape[-1]))


def gemma_closed_form(path: Path | None) -> tuple[float, float]:
    """Relative error of the closed-form gradient of the last down_proj against autograd: exact tail, and without the
    post-feed-forward norm.
    """
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    if path is None:
        torch.manual_seed(0)
        lm = Gemma3ForCausalLM(
            Gemma3TextConfig(
                vocab_size=512,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=32,
            )
        )
        for name, p in lm.named_parameters():
            if "norm" in name:
                nn.init.normal_(p, std=0.3)
    else:
        lm = Gemma3ForCausalLM.from_pretrained(path, dtype=torch.float32)
    lm.requires_grad_(False)
    last, eps = lm.model.layers[-1], lm.config.rms_norm_eps
    last.mlp.down_proj.weight.requires_grad_(True)
    kept: dict[str, Tensor] = {}
    last.mlp.down_proj.register_forward_hook(lambda _, i, o: kept.update(u=i[0].detach(), m=o.detach()))
    lm.model.norm.register_forward_pre_hook(lambda _, i: kept.update(h=i[0].detach()))
    ids = torch.randint(1, min(9000, lm.config.vocab_size), (2, 12), generator=torch.Generator().manual_seed(1))
    logits = lm(ids).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    true = last.mlp.down_proj.weight.grad
    with torch.no_grad():
        n = ids[:, 1:].numel()
        delta = (logits[:, :-1].softmax(-1) - F.one_hot(ids[:, 1:], lm.config.vocab_size)) / n
        a = _unnorm(delta @ lm.lm_head.weight, kept["h"][:, :-1], 1 + lm.model.norm.weight, eps)
        exact = _unnorm(a, kept["m"][:, :-1], 1 + last.post_feedforward_layernorm.weight, eps)
        u = kept["u"][:, :-1].flatten(0, 1)
        errors = [float((g.flatten(0, 1).T @ u - true).norm() / true.norm()) for g in (exact, a)]
    return errors[0], errors[1]


def main() -> None:
    """Print the floors as lines of ``name: value``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gemma", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    fit, bare = fit_cost()
    print(f"Trainer.fit of one step: {fit:.1f} ms; the same step in a bare loop: {bare:.1f} ms")
    for dtype in (torch.float32, torch.bfloat16):
        same, far = threads_change_bits(dtype)
        print(f"1 and 2 torch threads, {dtype}: {'same bits' if same else f'bits differ, by up to {far:.1e}'}")
    exact, without = gemma_closed_form(args.gemma)
    print(
        f"Gemma-3 last down_proj gradient, closed form against autograd: relative error {exact:.1e}; "
        f"without its post-feed-forward norm {without:.2f}"
    )


if __name__ == "__main__":
    main()
