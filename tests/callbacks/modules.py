"""LightningModules for the tests of callbacks: one network, its layers built in three places, and a tiny Llama."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pfl.callbacks.colora import CoLoRA


def network(width: int = 6) -> nn.ModuleDict:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) for _ in range(2)]
    return nn.ModuleDict({"body": nn.Sequential(*blocks), "head": nn.Linear(width, 2)})


class Steps(L.LightningModule):
    """What the modules below have in common."""

    def __init__(self, width: int = 6, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net: nn.ModuleDict | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.net["head"](self.net["body"](x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(CoLoRA.param_groups(self, lr=self.hparams.lr, lr_pq=2 * self.hparams.lr))


class Plain(Steps):
    """Layers in ``__init__``."""

    def __init__(self, width: int = 6, lr: float = 0.05) -> None:
        super().__init__(width, lr)
        self.net = network(width)


class InSetup(Steps):
    """Layers in ``setup``."""

    def setup(self, stage: str) -> None:
        if self.net is None:
            self.net = network(self.hparams.width)


class InConfigureModel(Steps):
    """Layers in ``configure_model``."""

    def configure_model(self) -> None:
        if self.net is None:
            self.net = network(self.hparams.width)


def loader(width: int = 6, batch_size: int = 8) -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(32, width, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=batch_size)


def colora(**kwargs) -> CoLoRA:
    return CoLoRA(**{"rank": 2, "alpha": 4, "num_blocks": 1, **kwargs})


def trainer(*callbacks: L.Callback, epochs: int = 1, **kwargs) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(
        **{
            **quiet,
            "max_epochs": epochs,
            "accelerator": "cpu",
            "enable_checkpointing": False,
            "callbacks": list(callbacks),
            **kwargs,
        }
    )
