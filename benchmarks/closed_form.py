"""What the closed-form gradient costs beyond the proxy's forward pass, over the share of positions that are answers.

    OMP_NUM_THREADS=1 python -m benchmarks.closed_form [--layers 30] [--tokens 256] [--json]

The proxy has SmolLM2-135M's shape and random weights, since only shapes cost time. `forward` is the model as it is
called to make logits at every position; `probe` is `CausalLMProbe.sketch` (forward, closed form, projection to 16,384
numbers); `autograd` is what the probe would cost without the closed form: forward and backward to one weight. CPU
seconds, one thread; the three take turns and the fastest of all turns counts.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_pfl.relevance import CausalLMProbe

SHARES = (0.01, 0.05, 0.25, 1.0)


def seconds(run: object) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    run()  # type: ignore[operator]
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=chosen.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    probe = CausalLMProbe(model)
    probe.prepare()
    target = model.model.layers[-1].mlp.down_proj.weight
    ids = torch.randint(config.vocab_size, (1, chosen.tokens))
    print("| answers | forward s | probe s | probe / forward | autograd s | largest difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for share in SHARES:
        labels = torch.full_like(ids, -100)
        count = max(1, round(share * chosen.tokens))
        labels[:, chosen.tokens - count :] = ids[:, chosen.tokens - count :]
        batch = {"input_ids": ids, "labels": labels}
        kept: dict[str, torch.Tensor] = {}

        def forward(batch: dict[str, torch.Tensor] = batch) -> None:
            with torch.no_grad():
                model(input_ids=batch["input_ids"], use_cache=False)

        def autograd(batch: dict[str, torch.Tensor] = batch, kept: dict[str, torch.Tensor] = kept) -> None:
            target.requires_grad_(True)
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
            kept["exact"] = torch.autograd.grad(loss, target)[0]
            target.requires_grad_(False)

        runs = {"forward": forward, "probe": lambda batch=batch: probe.sketch(batch), "autograd": autograd}
        found = dict.fromkeys(runs, float("inf"))
        for _ in range(chosen.turns):
            for name, run in runs.items():
                found[name] = min(found[name], seconds(run))
        error = float((probe.gradient(batch) - kept["exact"]).abs().max() / kept["exact"].abs().max())
        ratio = found["probe"] / found["forward"]
        print(
            f"| {100 * share:.0f} % | {found['forward']:.2f} | {found['probe']:.2f} | {ratio:.3f} "
            f"| {found['autograd']:.2f} | {error:.1e} |",
            flush=True,
        )
        if chosen.json:
            print(json.dumps({"share": share, "tokens": chosen.tokens, "layers": chosen.layers, **found}), flush=True)


if __name__ == "__main__":
    main()
