"""Jobs for the tests of pools: clients that train, fail, die or dawdle."""

import os
import signal
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from lightning_pfl.federation.client_strategy import ClientStrategy
from lightning_pfl.federation.jobs import Job
from lightning_pfl.federation.privacy import Permit, Privacy
from lightning_pfl.federation.snapshot import Snapshot
from lightning_pfl.federation.sources import ClientData
from lightning_pfl.federation.template import ClientTemplate
from lightning_pfl.functional.accounting import Ledger, PrivacyBudget
from lightning_pfl.functional.mechanisms import UpdateNoise
from lightning_pfl.types import Assignment
from tests.federation.tiny import ClientsOwnData, Tiny


class Backbone(Tiny):
    """Big enough that its frozen part lies in the tensor file."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Parameter(torch.eye(4).repeat(80, 80), requires_grad=False)

    def forward(self, x):
        return super().forward(x @ self.backbone[:4, :4])


class Eventful(Backbone):
    """What happens to a client is written in its id."""

    def __init__(self, notes=None):
        super().__init__()
        self.notes = notes  # a folder

    def training_step(self, batch, batch_idx):
        client_id = self.trainer.strategy.client_id
        if client_id.startswith("raises"):
            raise ZeroDivisionError(f"what {client_id} did")
        if client_id.startswith("dies-once") and batch_idx == 1 and self._first_time(client_id):
            os.kill(os.getpid(), signal.SIGKILL)
        if client_id.startswith("dies-always"):
            os._exit(1)
        if client_id.startswith("loses-its-gpu") and self._first_time(client_id):
            raise torch.AcceleratorError("CUDA error: device unavailable")
        if client_id.startswith("interrupts"):
            raise KeyboardInterrupt
        if client_id.startswith("dawdles"):
            (Path(self.notes) / f"{os.getpid()}.pid").touch()
            time.sleep(60)
        return super().training_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        if self.trainer.strategy.client_id.startswith("cannot-be-sent"):
            return (number for number in range(3))
        return super().predict_step(batch, batch_idx)

    def _first_time(self, client_id):
        note = Path(self.notes) / client_id
        first = not note.exists()
        note.touch()
        return first


class Data(ClientsOwnData):
    """Lightning rebuilds loaders for prediction, and cannot when `batch_size` was passed by position."""

    def predict_dataloader(self):
        return DataLoader(self._dataset(10_000), batch_size=self.batch_size)


def snapshot_of(module, file, *, rounds=4, **settings):
    """As the strategy takes it."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(accelerator="cpu", max_epochs=rounds, **dict.fromkeys(quiet, False), **settings)
    template = ClientTemplate.take(trainer)
    strategy = ClientStrategy(
        client_ids=tuple(f"client-{index}" for index in range(5)),
        share=["encoder", "head"],
        local_epochs=1,
        local_steps=None,
        accelerator=None,
        devices=None,
        precision=None,
    )
    trainer = template.equip(
        strategy, callbacks=(), save_dir=None, has_logger=False, max_epochs=rounds, min_epochs=None
    )
    return Snapshot.take((trainer, module, ClientData(Data())), file)


def job(client_id, *, round=0, stage=TrainerFn.FITTING, snapshot="model", state=None, num_threads=1):
    seed = sum(map(ord, client_id))
    return Job(Assignment(client_id, round), stage, snapshot, state, seed, num_threads, _permit(client_id))


def _permit(client_id):
    """Who dies sends noise: it must be the same when the turn is run again."""
    if not client_id.startswith("dies-once"):
        return None
    privacy = Privacy(budget=PrivacyBudget(100, 1e-5), updates=UpdateNoise(multiplier=1.0, max_norm=1.0))
    return Permit(privacy, client_id.encode().ljust(32), Ledger())


def bytes_of(result):
    """Everything in a result that must not depend on where it was made."""
    assert result.failure is None, result.failure.trace
    if result.update is None:
        return dict(result.metrics)
    update = result.update
    return dict(result.metrics), result.state, update.shared.common.vector.numpy().tobytes(), update.num_examples


def two_rounds(pool, client_ids, *, reverse=False):
    """By client and round, the bytes of its results."""
    states, results = {}, {}
    for round in range(2):
        jobs = [job(client_id, round=round, state=states.get(client_id)) for client_id in client_ids]
        for result in pool.run(jobs[::-1] if reverse else jobs):
            states[result.client_id] = result.state
            results[result.client_id, round] = bytes_of(result)
    return results
