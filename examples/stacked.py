"""Several clients in one pass: eight clients of one model, trained one after another and all at once.

Only `training_step` says that its loss may be stacked. The scores agree but for rounding.
"""

import time

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pfl import CoLoRA, FederatedStrategy, LocalPool, StackedPool, stackable


class MyModule(L.LightningModule):
    """Four layers, frozen but for their adapters and the head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.ReLU())))
        self.head = nn.Linear(16, 2)

    def loss_of(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.body(x)), y)

    def training_step(self, batch, _):
        return stackable(self.loss_of, batch)

    def validation_step(self, batch, _):
        self.log("val_loss", self.loss_of(batch))

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1, momentum=0.9)


class MyData(L.LightningDataModule):
    """Every client asks for the sign of a feature of its own."""

    def rows(self, num_rows):
        client = self.trainer.strategy.client_ids.index(self.trainer.strategy.client_id)
        x = torch.randn(num_rows, 16, generator=torch.Generator().manual_seed(client))
        return TensorDataset(x, (x[:, client] > 0).long())

    def train_dataloader(self):
        return DataLoader(self.rows(64), batch_size=16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.rows(256), batch_size=256)


def val_loss(pool):
    L.seed_everything(0)
    trainer = L.Trainer(
        max_epochs=3,
        callbacks=[CoLoRA(rank=4, alpha=8, num_blocks=2, blocks="body", train_also=["head"])],
        strategy=FederatedStrategy(clients=8, pool=pool),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    begun = time.perf_counter()
    trainer.fit(MyModule(), datamodule=MyData())
    loss = trainer.callback_metrics["val_loss"]
    print(f"{type(pool).__name__}: {time.perf_counter() - begun:.1f} s, val_loss {loss:.6f}")
    return loss


if __name__ == "__main__":
    torch.testing.assert_close(val_loss(StackedPool(at_once=8)), val_loss(LocalPool()), rtol=1e-4, atol=0)
