"""A ward that comes after training: it gets a model from the others by the sketch of its task, then goes on alone."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pfl import Client, CoLoRA, FederatedStrategy, GradientProbe, LocalPool, RelevanceProbe


class Regressor(L.LightningModule):
    """A pretrained body and head (here: of random weights), in two widths."""

    def __init__(self, width=64):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(width)
            layers = [nn.Linear(16, width), nn.ReLU()]
            for _ in range(3):
                layers += [nn.Linear(width, width), nn.ReLU()]
            self.body = nn.Sequential(*layers)
            self.head = nn.Linear(width, 1)

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.head(self.body(x)), y)

    def training_step(self, batch, _):
        return self.loss(batch)

    def validation_step(self, batch, _):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.0)


class Wide(Regressor):
    def __init__(self):
        super().__init__(96)


class Ward(L.LightningDataModule):
    """What one ward measures; wards of one kind follow one rule."""

    def __init__(self, kind, seed):
        super().__init__()
        self.kind, self.seed = kind, seed

    def loader(self, num_rows, seed):
        x = torch.randn(num_rows, 16, generator=torch.Generator().manual_seed(seed))
        y = x[:, :1] + x[:, 1:2] if self.kind == "heart" else x[:, 2:3] - x[:, 3:4]
        return DataLoader(TensorDataset(x, y), batch_size=16)

    def train_dataloader(self):
        return self.loader(128, self.seed)

    def val_dataloader(self):
        return self.loader(256, 1000 + self.seed)


def squared_error(module, batch):
    return nn.functional.mse_loss(module(batch[0]), batch[1])


def main():
    L.seed_everything(0)
    colora = CoLoRA(rank=8, alpha=16, num_blocks=2, blocks="body")
    probe = RelevanceProbe(GradientProbe(nn.Linear(16, 1), squared_error, parameters=["weight"], size=256))
    wards = [
        Client(f"{kind}-{index}", model=(Regressor, Wide)[index], datamodule=Ward(kind, seed))
        for seed, (kind, index) in enumerate([("heart", 0), ("heart", 1), ("lung", 0), ("lung", 1)])
    ]
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
             "enable_model_summary": False}  # fmt: skip
    trainer = L.Trainer(
        max_epochs=5, callbacks=[colora, probe], strategy=FederatedStrategy(wards, pool=LocalPool()), **quiet
    )
    trainer.fit(Regressor())

    for model in (Regressor, Wide):  # of either architecture
        data = Ward("heart", seed=9)
        newcomer = trainer.strategy.personalize_new(Client(f"heart-new-{model.__name__}", model=model, datamodule=data))
        print({client: round(weight, 2) for client, weight in newcomer.weights.items()})
        assert newcomer.weights["heart-0"] + newcomer.weights["heart-1"] > 0.8

        alone = L.Trainer(max_epochs=2, callbacks=[CoLoRA(rank=8, alpha=16, num_blocks=2, blocks="body")], **quiet)
        start = alone.validate(newcomer.module, data, verbose=False)[0]["val_loss"]
        alone.fit(newcomer.module.train(), data)
        end = alone.validate(newcomer.module, data, verbose=False)[0]["val_loss"]
        base = alone.validate(model(), data, verbose=False)[0]["val_loss"]
        print(f"{model.__name__}: {base:.2f} without anything, {start:.2f} from the others, {end:.2f} after two epochs")


if __name__ == "__main__":
    main()
