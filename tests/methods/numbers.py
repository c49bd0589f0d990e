"""A federation small enough to work out by hand.

One linear layer of width 1, W = 0 and rank 1 with A = B = s = 1, gives h(x) = P x + Q; with x = 1 and the loss
(h - y)^2 / 2, P and Q have one gradient, h - y, so both are one number p, h = 2 p, and a step of SGD at 0.1 is
p <- p - 0.1 (2 p - y).
Client a wants y = 1 and has one example, b wants y = 3 and has three.
"""

from functools import partial
from math import exp, sqrt
from typing import ClassVar

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pfl.adapters import bases_of, set_bases
from lightning_pfl.callbacks.colora import CoLoRA
from lightning_pfl.callbacks.federated import AdapterUser
from lightning_pfl.federation import Client
from lightning_pfl.federation.turn import unpack_state
from tests.federation.runs import strategy_of, trainer_of

WANTED = {"a": 1.0, "b": 3.0, "c": 1.0}
CLIENTS = (Client("a", num_examples=1), Client("b", num_examples=3))
NUMBER = partial(CoLoRA, rank=1, alpha=1, num_blocks=1, target_modules=["fc"])
PLAIN = partial(CoLoRA, rank=1, alpha=1, num_blocks=0, target_modules=["fc"])


class Number(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(1, 1, bias=False)})])
        nn.init.zeros_(self.blocks[0]["fc"].weight)

    def forward(self, x):
        return self.blocks[0]["fc"](x)

    def training_step(self, batch):
        return half_square(self, batch)[0]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OtherNumber(Number):
    """The same function in another architecture."""

    def __init__(self):
        super().__init__()
        self.blocks[0]["gate"] = nn.Linear(1, 1)


class Wanted(L.LightningDataModule):
    """One batch of one example per step, the same always."""

    def train_dataloader(self):
        wanted = WANTED[self.trainer.strategy.client_id]
        return DataLoader(TensorDataset(torch.ones(2, 1), torch.full((2, 1), wanted)), batch_size=1)


def half_square(module, batch):
    h = module(batch[0])
    return (h - batch[1]).square().mean() / 2, torch.cat([torch.zeros_like(h), h], dim=1)


def public_batches(module):
    return [torch.ones(1, 1)]


def public_logits(module, batch):
    h = module(batch)
    return torch.cat([torch.zeros_like(h), h], dim=1)


class Ones(AdapterUser):
    """Gives both architectures the bases A = B = 1, whose signs are drawn."""

    def adapters_ready(self, module):
        set_bases(module, {address: (torch.ones(1, 1), torch.ones(1, 1)) for address in bases_of(module)})


class AtTheFirstStep(L.Callback):
    """What an adapter is when a round's training begins, by client and round."""

    seen: ClassVar = {}

    def __init__(self, adapter):
        self.adapter = adapter

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        value = pl_module.blocks[0]["fc"].colora_P[self.adapter].item()
        self.seen[self.adapter, trainer.strategy.client_id, trainer.strategy.round] = value


def run(tmp_path, method, *, rounds=2, steps=1, callbacks=(), clients=CLIENTS, data=None):
    strategy = strategy_of(clients, share=(), aggregator=method.aggregator, local_epochs=1, local_steps=steps)
    module = Number()
    callbacks = [method.callbacks[0], Ones(), *method.callbacks[1:], *callbacks]
    trainer_of(tmp_path, strategy, max_epochs=rounds, callbacks=callbacks).fit(module, datamodule=data or Wanted())
    return strategy, module


def trained(strategy, name="P.default", clients="ab"):
    """What clients have after their last turn, before anything is sent back."""
    states = (unpack_state(strategy.store.get(client))["state_dict"] for client in clients)
    return [state[f"blocks.0.fc.colora_{name}"].item() for state in states]


def answers(strategy, module, clients="ab"):
    """h(1) of clients' models after aggregation."""
    return [strategy.personalize(module, client)(torch.ones(1, 1)).item() for client in clients]


def near(*numbers, abs=1e-6):
    return pytest.approx(list(numbers), abs=abs)


def sigmoid(z):
    return 1 / (1 + exp(-z))


def adam(p, gradient, *, steps, lr):
    """Adam in one number, straight from its paper."""
    m = v = 0.0
    for t in range(1, steps + 1):
        g = gradient(p)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p -= lr * (m / (1 - 0.9**t)) / (sqrt(v / (1 - 0.999**t)) + 1e-8)
    return p
