"""The quick start: your own LightningModule, your own data, four clients with models of two widths.

Two pairs of clients share a rule. Each client has 64 examples, which is few for it alone; its relative has another 64,
but a model of another width, so that averaging weights would not even be possible.
"""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pfl import Client, CoLoRA, FederatedStrategy, LocalPool


class MyModule(L.LightningModule):
    """Any module will do; nothing here knows of federations."""

    def __init__(self, width=64):
        super().__init__()
        layers = [nn.Linear(16, width), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Linear(width, width), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 2)

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.body(x)), y)

    def validation_step(self, batch, _):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.head(self.body(x)), y))

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.0)


class MyData(L.LightningDataModule):
    """Reads `trainer.strategy.client_id`, as data on a client's own disk would do by being there."""

    def rows(self, num_rows, seed):
        client_id = self.trainer.strategy.client_id
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num_rows, 16, generator=generator)
        rule = x[:, 0] * x[:, 1] if client_id in ("ward-3", "ward-7") else x[:, 2] + x[:, 3]
        return TensorDataset(x, (rule > 0).long())

    def train_dataloader(self):
        seed = sum(map(ord, self.trainer.strategy.client_id))
        return DataLoader(self.rows(64, seed), batch_size=16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.rows(256, seed=0), batch_size=256)


def main():
    L.seed_everything(0)
    trainer = L.Trainer(
        max_epochs=5,  # rounds
        callbacks=[CoLoRA(rank=8, alpha=16, num_blocks=2, blocks="body", train_also=["head"])],
        strategy=FederatedStrategy(
            clients=[
                Client("ward-3"),
                Client("ward-7", model=lambda: MyModule(width=96)),
                Client("line-1"),
                Client("line-2", model=lambda: MyModule(width=96)),
            ],
            pool=LocalPool(),  # without it: RayPool(), on this machine or on a cluster
        ),
    )
    trainer.fit(MyModule(), MyData())

    print({name: round(value.item(), 3) for name, value in trainer.callback_metrics.items() if "val_loss" in name})
    personal = trainer.strategy.personalize(MyModule(), "ward-3")  # that client's model
    trainer.strategy.export("ward-3", "adapters/ward-3")  # a PEFT folder
    return personal


if __name__ == "__main__":
    main()
