"""W7: SmolLM2-135M, two clients that take three steps of 256 tokens a round, or twelve (W7-long), AdamW, float32.

The third argument says who runs it: "loop" is a bare loop over PEFT's plain LoRA on the same layers at the same rank;
"local" is this package with `CoLoRA` and what a client of a federation has besides, a frozen global branch and gates.
Weights come from the package cache (`lightning_pfl.benchmark.weights`).
"""

from __future__ import annotations

import re
import sys

import lightning as L
import torch
import torch._dynamo
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.engine.marks import Marks
from benchmarks.engine.model import Steps
from benchmarks.engine.systems.module import BARE, RoundMarks, quiet
from lightning_pfl import CoLoRA, FederatedStrategy, LocalPool, UniformAggregator
from lightning_pfl.benchmark.weights import SMOLLM2_135M, load_language_model

CLIENTS, ROUNDS, TOKENS, RANK = 2, 3, 256, 16
STEPS = {"W7": 3, "W7-long": 12}[sys.argv[1]]


class Tuner(L.LightningModule):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss

    def train_dataloader(self) -> Steps:
        return batches(int(self.trainer.strategy.client_id.removeprefix("client-")))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


def batches(client: int) -> Steps:
    """Random tokens: what they say costs no time."""
    generator = torch.Generator().manual_seed(client)
    return Steps(list(torch.randint(1000, 40_000, (STEPS, 1, TOKENS), generator=generator)))


def federate(model: PreTrainedModel, marks: Marks) -> int:
    strategy = FederatedStrategy(clients=CLIENTS, aggregator=UniformAggregator(), pool=LocalPool())
    callbacks = [CoLoRA(rank=RANK, alpha=2 * RANK, num_blocks=4), RoundMarks(marks)]
    module = Tuner(model)
    trainer = L.Trainer(max_epochs=ROUNDS, strategy=strategy, callbacks=callbacks, **BARE)
    marks.started()
    trainer.fit(module)
    return sum(hasattr(layer, "colora_config") for layer in module.modules())


def loop(model: PreTrainedModel, marks: Marks) -> int:
    targets = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and re.search(r"layers\.\d+\.", name)
    ]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets), model)
    model.train()
    marks.started()
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4) for _ in range(CLIENTS)
    ]
    for _ in range(ROUNDS):
        for client, optimizer in enumerate(optimizers):
            for batch in batches(client):
                optimizer.zero_grad()
                model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
                optimizer.step()
        marks.round()
    return len(targets)


def main() -> None:
    marks = Marks(sys.argv[2], rounds=ROUNDS)
    marks.imported()
    quiet()
    torch.set_num_threads(1)
    model, _ = load_language_model(SMOLLM2_135M, dtype=torch.float32)
    layers = (loop if sys.argv[3] == "loop" else federate)(model, marks)
    marks.write(adapted_layers=layers, tokens_a_round=CLIENTS * STEPS * TOKENS)


if __name__ == "__main__":
    main()
