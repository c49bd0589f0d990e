"""What an adapted layer costs: forward and backward of every variant, against PEFT's plain LoRA of the same rank.

    python -m benchmarks.adapter_layer                                                 # the whole grid, some minutes
    python -m benchmarks.adapter_layer --widths 576 --tokens 2048 --ranks 16
    python -m benchmarks.adapter_layer --widths 512 --tokens 256 --ranks 16 --modes compiled autocast checkpointed

One row per shape: milliseconds of CPU time of a forward and backward with plain LoRA, and what the variants cost as
multiples of that. The base layer is frozen and the same throughout, its input needs a gradient, as inside a model.
Variants take turns and the fastest of all turns counts, since a shared machine only ever adds time. The first column of
ratios is plain LoRA of twice the rank: that is how many numbers an adapter with a global branch has to pass over.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_pfl.adapters import CoLoraConfig, InputGate, StaticGate, inject

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("eager", "compiled", "autocast", "checkpointed")
PLAIN, TWICE = "LoRA r", "LoRA 2r"


def lora(width: int, rank: int, dtype: torch.dtype, alpha: float) -> nn.Module:
    """PEFT's own layer; like ours it keeps its adapter in float32."""
    model = nn.ModuleDict({"fc1": nn.Linear(width, width)}).to(dtype)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=["fc1"]), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model["fc1"]


def ours(width: int, rank: int, dtype: torch.dtype, is_colora: bool, **config) -> nn.Module:
    """One adapted square layer."""
    model = nn.ModuleDict({"fc1": nn.Linear(width, width)}).to(dtype)
    placement = {"fc1": "main/0/fc1" if is_colora else None}
    inject(model, CoLoraConfig(r=rank, alpha=2 * rank, placement=placement, base_identity="b", **config))
    return model["fc1"]


def variants(width: int, rank: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Every kind of adapter by name, plain LoRA first."""
    found = {PLAIN: lora(width, rank, dtype, 2 * rank), TWICE: lora(width, 2 * rank, dtype, 2 * rank)}
    for kind, is_colora in (("A B", False), ("P Q", True)):
        found[kind] = ours(width, rank, dtype, is_colora)
        for gate in (StaticGate(), InputGate()):
            name = f"{kind} + G, {type(gate).__name__.removesuffix('Gate').lower()}"
            found[name] = ours(width, rank, dtype, is_colora, global_branch=True, gate=gate)
    return found


def once(module: nn.Module, x: Tensor, mode: str) -> Callable[[], None]:
    """One forward and backward, gradients thrown away."""
    forward = torch.compile(module) if mode == "compiled" else module

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            out = checkpoint(forward, x, use_reentrant=False) if mode == "checkpointed" else forward(x)
        out.sum().backward()
        module.zero_grad(set_to_none=True)
        x.grad = None

    return run


def compare(width: int, tokens: int, rank: int, dtype: torch.dtype, mode: str, seconds: float) -> dict[str, float]:
    """Fastest CPU seconds of each variant.

    Args:
        width: of the square layer.
        tokens: rows of its input, in one sample.
        rank: of the adapter.
        dtype: of the base layer and its input.
        mode: of `MODES`.
        seconds: of CPU time to spend, with at least five turns.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(1, tokens, width, dtype=dtype, requires_grad=True)
    runs = {name: once(module, x, mode) for name, module in variants(width, rank, dtype).items()}
    for run in runs.values():
        run()
        run()  # the second pass still allocates
    best = dict.fromkeys(runs, float("inf"))
    begun = time.process_time()
    for turn in itertools.count():
        if turn >= 5 and time.process_time() - begun > seconds:
            return best
        for name, run in runs.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager"])
    parser.add_argument("--seconds", type=float, default=1.0, help="of CPU time per shape, besides the warm-up")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    shapes = itertools.product(chosen.modes, chosen.dtypes, chosen.widths, chosen.tokens, chosen.ranks)
    for index, (mode, dtype, width, tokens, rank) in enumerate(shapes):
        best = compare(width, tokens, rank, DTYPES[dtype], mode, chosen.seconds)
        if index == 0:
            heads = ["mode", "base", "width", "tokens", "rank", f"{PLAIN}, ms", *list(best)[1:]]
            print(f"| {' | '.join(heads)} |\n| {' | '.join(['---'] * len(heads))} |")
        ratios = [f"{seconds / best[PLAIN]:.2f}" for seconds in list(best.values())[1:]]
        cells = [mode, dtype, *map(str, (width, tokens, rank)), f"{1000 * best[PLAIN]:.2f}", *ratios]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
