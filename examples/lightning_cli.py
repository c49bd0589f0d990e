"""A federated run from a YAML file, through LightningCLI.

python lightning_cli.py fit --config federated.yaml
"""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import TensorDataset

from lightning_pfl import ClientDataModule, dirichlet_partition

CONFIG = """
seed_everything: 0
trainer:
  max_epochs: 3
  accelerator: cpu
  callbacks:
    - class_path: lightning_pfl.CoLoRA
      init_args: {rank: 4, alpha: 8, num_blocks: 2, blocks: body, train_also: [head]}
  strategy:
    class_path: lightning_pfl.FederatedStrategy
    init_args:
      clients: 5
      fraction: 0.6
      pool: {class_path: lightning_pfl.LocalPool}
"""


class Classifier(L.LightningModule):
    def __init__(self, width: int = 32, lr: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Linear(width, 4)

    def loss(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.body(x)), y)

    def training_step(self, batch, _):
        return self.loss(batch)

    def validation_step(self, batch, _):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        trained = (p for p in self.parameters() if p.requires_grad)
        return torch.optim.AdamW(trained, lr=self.hparams.lr, weight_decay=0.0)


class Data(ClientDataModule):
    def __init__(self, num_clients: int = 5, concentration: float = 0.5):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(600, 8, generator=generator)
        y = x[:, :4].argmax(1)
        parts = dirichlet_partition(y[:500], num_clients, concentration=concentration, min_rows=8)
        super().__init__(TensorDataset(x[:500], y[:500]), parts, val=TensorDataset(x[500:], y[500:]), batch_size=16)


def main():
    if len(sys.argv) == 1:  # without arguments: write the config, then do what a user would do with it
        Path("federated.yaml").write_text(CONFIG, encoding="utf-8")
        sys.argv += ["fit", "--config", "federated.yaml"]
    LightningCLI(Classifier, Data)


if __name__ == "__main__":
    main()
