"""What an adapted layer costs: forward and backward of every variant, against PEFT's plain LoRA of the same rank.

    python -m benchmarks.adapter_layer

Prints one line per variant: CPU seconds per forward and backward, and their ratio to plain LoRA's. The layers' own cost
is what differs, so the base layer is the same frozen linear layer throughout. Variants take turns and the fastest of
all turns counts, since a shared machine only ever adds time. The numbers in the documentation come from this script.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lightning_pfl.adapters import Additive, CoLoraConfig, InputGate, StaticGate, inject


def layer(width: int, rank: int, is_colora: bool, **config) -> nn.Module:
    """One adapted square layer with inputs as a block would hand them."""
    model = nn.ModuleDict({"fc1": nn.Linear(width, width)})
    placement = {"fc1": "main/0/fc1" if is_colora else None}
    inject(model, CoLoraConfig(r=rank, alpha=2 * rank, placement=placement, base_identity="b", **config))
    return model["fc1"]


def variants(width: int, rank: int) -> dict[str, nn.Module]:
    """Every kind of adapter by name, plain LoRA first."""
    plain = nn.ModuleDict({"fc1": nn.Linear(width, width)})
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["fc1"]), plain)
    twice = nn.ModuleDict({"fc1": nn.Linear(width, width)})
    inject_adapter_in_model(LoraConfig(r=2 * rank, lora_alpha=2 * rank, target_modules=["fc1"]), twice)
    found = {"PEFT LoRA, rank r": plain["fc1"], "PEFT LoRA, rank 2r": twice["fc1"]}
    for kind, is_colora in (("conventional", False), ("Co-LoRA", True)):
        found[f"{kind}, no global branch"] = layer(width, rank, is_colora)
        for gate in (StaticGate(), StaticGate(Additive()), InputGate()):
            found[f"{kind}, {gate}"] = layer(width, rank, is_colora, global_branch=True, gate=gate)
    return found


def once(module: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """One forward and backward, gradients thrown away."""

    def run() -> None:
        module(x).sum().backward()
        module.zero_grad(set_to_none=True)
        x.grad = None

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="positions per sample; 8 samples")
    parser.add_argument("--turns", type=int, default=15)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.randn(8, chosen.tokens, chosen.width, requires_grad=True)
    runs = {name: once(module, x) for name, module in variants(chosen.width, chosen.rank).items()}
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(chosen.turns + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if turn:  # the first turn warms up
                best[name] = min(best[name], time.process_time() - start)
    reference = best["PEFT LoRA, rank r"]
    print(
        f"width {chosen.width}, rank {chosen.rank}, 8 x {chosen.tokens} positions, one thread, best of {chosen.turns}"
    )
    for name, seconds in best.items():
        print(f"{name:45s} {1000 * seconds:8.2f} ms  {seconds / reference:5.2f}")


if __name__ == "__main__":
    main()
