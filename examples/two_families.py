"""Clients on language models of two families, aligned on public text, mixed by how related their tasks are."""

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from lightning_pfl import (
    CausalLMProbe,
    Client,
    CoLoRA,
    CoLoraConfig,
    FederatedStrategy,
    LocalPool,
    RelevanceAggregator,
    RelevanceProbe,
    align,
    draw_relevance,
    inject,
)
from lightning_pfl.adapters.readings import Reading

VOCABULARY = 64


def llama():
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    )  # fmt: skip


def gemma():
    torch.manual_seed(2)
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=1, head_dim=12, sliding_window=16,
        )
    )  # fmt: skip


class Tuner(L.LightningModule):
    def __init__(self, make_model=llama):
        super().__init__()
        self.model = make_model()

    def training_step(self, batch, _):
        return self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    def validation_step(self, batch, _):
        self.log("val_loss", self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(CoLoRA.param_groups(self, lr=1e-3, lr_pq=1e-2))


class Counting(L.LightningDataModule):
    """Clients called up-... count upwards, the others downwards."""

    def loader(self, seed):
        client_id = self.trainer.strategy.client_id
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(20, 44, (32, 1), generator=generator)
        step = 1 if client_id.startswith("up") else -1
        ids = start + step * torch.arange(12)
        return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=8)

    def train_dataloader(self):
        return self.loader(seed=1)

    def val_dataloader(self):
        return self.loader(seed=2)


def public_readings(count=24):
    """Public data as both models read it. They share a tokenizer here; `align` takes texts and tokenizers too."""
    generator = torch.Generator().manual_seed(0)
    for ids in torch.randint(0, VOCABULARY, (count, 4, 16), generator=generator):
        reading = Reading({"input_ids": ids, "labels": ids}, places=torch.arange(16).expand(4, -1))
        yield {"llama": reading, "gemma": reading}


def main():
    L.seed_everything(0)
    models = {"llama": llama(), "gemma": gemma()}
    for model in models.values():
        inject(model, CoLoraConfig(r=8, alpha=16, num_blocks=2))
    alignment = align(models, public_readings(), anchor="llama")

    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=[
            CoLoRA(rank=8, alpha=16, num_blocks=2, aligned=alignment),
            RelevanceProbe(CausalLMProbe(llama(), size=1024), every_n_steps=2),
        ],
        strategy=FederatedStrategy(
            clients=[
                Client("up-llama"),
                Client("up-gemma", model=lambda: Tuner(gemma)),
                Client("down-llama"),
                Client("down-gemma", model=lambda: Tuner(gemma)),
            ],
            aggregator=RelevanceAggregator(),
            pool=LocalPool(),
        ),
        enable_checkpointing=False,
    )
    trainer.fit(Tuner(), Counting())

    last = trainer.strategy.relevance[-1]
    draw_relevance(last.weights, last.client_ids, "relevance.png")
    row = dict(zip(last.client_ids, last.weights[last.client_ids.index("up-llama")].tolist(), strict=True))
    print(f"up-llama keeps {row.pop('up-llama'):.2f} of its own")
    print("and takes:", {client: round(weight, 2) for client, weight in row.items()})
    assert max(row, key=row.get) == "up-gemma", "the relative is on the other family"


if __name__ == "__main__":
    main()
