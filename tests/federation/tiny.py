"""Tiny modules and data for the tests of federation."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, SumMetric

from lightning_pfl.functional.stacking import stackable


def dataset(seed, num_examples=12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_examples, 4, generator=generator)
    weight = torch.randn(4, 1, generator=generator)
    return TensorDataset(x, x @ weight)


class Tiny(L.LightningModule):
    """Dropout, so that the random stream shows in the weights; AdamW and OneCycle, so that state and horizon do."""

    def __init__(self, lr=0.05):
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encoder = nn.Linear(4, 8)
            self.head = nn.Linear(8, 1)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return self.head(self.dropout(torch.tanh(self.encoder(x))))

    def loss_of(self, batch):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = stackable(self.loss_of, batch)  # with dropout, each client computes it by itself, but waits for others
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.hparams.lr, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class ClientsOwnData(L.LightningDataModule):
    """Every client has data of its own, by `trainer.strategy.client_id`."""

    def __init__(self, num_examples=12, batch_size=4, num_workers=0):
        super().__init__()
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.num_workers = num_workers

    def _dataset(self, offset):
        seed = sum(map(ord, self.trainer.strategy.client_id or ""))
        return dataset(seed + offset, self.num_examples)

    def train_dataloader(self):
        return DataLoader(self._dataset(0), batch_size=self.batch_size, shuffle=True, num_workers=self.num_workers)

    def val_dataloader(self):
        return DataLoader(self._dataset(10_000), batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


class Plateau(Tiny):
    """A plateau scheduler that reduces at once, on a metric that is logged every other epoch only."""

    def validation_step(self, batch, batch_idx):
        if self.current_epoch % 2 == 0:
            super().validation_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class Measures(Tiny):
    """Logs a mean, a maximum and a torchmetric over each epoch, and a metric of its own that is never reset."""

    def __init__(self):
        super().__init__()
        self.error = MeanMetric()
        self.total = SumMetric()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.error(loss.detach() ** 2)
        self.total.update(loss.detach())
        self.log("train_max", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("train_error", self.error, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        self.log("total", self.total.compute())


class Alternating(Tiny):
    """Manual optimization with two optimizers; gradients of the encoder pile up over two batches."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        body, head = self.optimizers()
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.manual_backward(loss)
        head.step()
        head.zero_grad()
        if self.trainer.fit_loop.total_batch_idx % 2 == 1:
            body.step()
            body.zero_grad()

    def configure_optimizers(self):
        return torch.optim.Adam(self.encoder.parameters(), lr=0.05), torch.optim.SGD(self.head.parameters(), lr=0.05)


class Blocks(L.LightningModule):
    """Two residual blocks of any width, for Co-LoRA; the body is frozen by it, the head private."""

    def __init__(self, width=8):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(width)
            self.embed = nn.Linear(4, width)
            self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(width, width)}) for _ in range(2))
            self.head = nn.Linear(width, 1)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + torch.tanh(block["fc"](x))
        return self.head(x)

    loss_of = Tiny.loss_of
    training_step = Tiny.training_step
    validation_step = Tiny.validation_step
    test_step = Tiny.test_step
    predict_step = Tiny.predict_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class Late(Blocks):
    """Builds its layers in `configure_model`, by the client's id: clients `wide*` are wider than the server."""

    def __init__(self):
        L.LightningModule.__init__(self)
        self.blocks = None

    def configure_model(self):
        if self.blocks is None:
            client_id = self.trainer.strategy.client_id
            built = Blocks(12 if (client_id or "").startswith("wide") else 8)
            for name, child in built.named_children():
                setattr(self, name, child)


class InSetup(Late):
    """The same in `setup`."""

    def setup(self, stage):
        Late.configure_model(self)

    def configure_model(self):
        pass


class WideBlocks(Blocks):
    def __init__(self):
        super().__init__(12)
