"""Promises of `lightning_pfl.callbacks.relevance_probe`."""

import copy
import io
import logging
import random

import lightning as L
import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_pfl.callbacks.relevance_probe import RelevanceProbe
from lightning_pfl.relevance.base import Probe

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Recorder(Probe):
    """Remembers what it was asked to sketch, and wastes random numbers; a batch's sketch is its mean, twice."""

    def __init__(self):
        self.prepared = 0
        self.seen = []

    @property
    def size(self):
        return 2

    def prepare(self):
        self.prepared += 1

    def sketch(self, batch):
        torch.rand(5), random.random(), numpy.random.rand()
        value = batch[0] if isinstance(batch, list | tuple) else batch
        self.seen.append(value.flatten().tolist())
        return value.float().mean().expand(2).clone()


class Model(L.LightningModule):
    """Dropout, so that a disturbed random generator shows in the weights."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(L.LightningDataModule):
    """Training batches 0, 1, 2, ...; of one number each."""

    def __init__(self, batches=6):
        super().__init__()
        self.numbers = torch.arange(batches, dtype=torch.float32)[:, None]

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.numbers), batch_size=1, shuffle=False)


class Noisy(Dataset):
    """Ten numbers from 100 on, each with noise of three kinds."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return 100.0 + index + 0.1 * torch.rand(()) + 0.01 * random.random() + 0.001 * numpy.random.rand()


class WithProbeData(Data):
    """Also has batches for the probe."""

    def probe_dataloader(self):
        return DataLoader(Noisy(), batch_size=4, shuffle=True)


def fit(callback, data=None, *, epochs=1, ckpt_path=None, **settings):
    """Train a seeded model; returns its trainer and weights."""
    torch.manual_seed(0)
    model = Model()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback] if callback else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(model, datamodule=data or Data(), ckpt_path=ckpt_path)
    return trainer, [parameter.detach().clone() for parameter in model.parameters()]


def test_every_nth_step_from_the_first_is_sketched_and_the_mean_is_taken_once():
    """Steps 0, 2 and 4 of six see the numbers 0, 2 and 4: mean 2. Then there is nothing."""
    callback = RelevanceProbe(Recorder(), every_n_steps=2)
    fit(callback)

    assert callback.probe.seen == [[0.0], [2.0], [4.0]]
    assert callback.take_sketch().tolist() == [2.0, 2.0]
    assert callback.take_sketch() is None


def test_steps_are_counted_on_over_epochs():
    """Six steps an epoch, every fourth: steps 0, 4 and 8; step 8 is batch 2 of the second epoch."""
    callback = RelevanceProbe(Recorder(), every_n_steps=4)
    fit(callback, epochs=2)

    assert callback.probe.seen == [[0.0], [4.0], [2.0]]


def test_an_optimizer_step_of_several_batches_is_sketched_once():
    """With two batches a step there are three steps; every second: steps 0 and 2, batches 0 and 4."""
    callback = RelevanceProbe(Recorder(), every_n_steps=2)
    fit(callback, accumulate_grad_batches=2)

    assert callback.probe.seen == [[0.0], [4.0]]


def test_a_batch_is_turned_into_a_probe_batch():
    """`to_probe` comes before the probe."""
    callback = RelevanceProbe(Recorder(), to_probe=lambda batch: batch[0] + 50, every_n_steps=5)
    fit(callback)

    assert callback.probe.seen == [[50.0], [55.0]]


def test_training_goes_on_to_the_same_bits_with_a_probe_as_without():
    """The probe, `to_probe` and the probe's loader draw random numbers; the client's are put back."""

    def wasteful(batch):
        torch.rand(7)
        return batch

    _, plain = fit(None)
    _, probed = fit(RelevanceProbe(Recorder(), to_probe=wasteful, every_n_steps=1))
    _, loaded = fit(RelevanceProbe(Recorder(), every_n_steps=1), WithProbeData())

    assert all(map(torch.equal, plain, probed))
    assert all(map(torch.equal, plain, loaded))


def test_a_probe_dataloader_supplies_the_batches_pass_after_pass():
    """Ten numbers in batches of 4, 4, 2: three batches are a pass; every pass shuffles anew."""
    callback = RelevanceProbe(Recorder(), every_n_steps=1)
    fit(callback, WithProbeData())

    first, second = (
        sorted(round(value) for part in callback.probe.seen[at : at + 3] for value in part) for at in (0, 3)
    )
    assert first == second == list(range(100, 110))
    order = [[round(value) for part in callback.probe.seen[at : at + 3] for value in part] for at in (0, 3)]
    assert order[0] != order[1]


def test_to_probe_outranks_a_probe_dataloader():
    """What the user says at the callback is what happens."""
    callback = RelevanceProbe(Recorder(), to_probe=lambda batch: batch[0], every_n_steps=6)
    fit(callback, WithProbeData())

    assert callback.probe.seen == [[0.0]]


@pytest.mark.parametrize("data", [Data, WithProbeData])
def test_a_turn_cut_in_two_by_a_checkpoint_gives_the_same_sketch(data, tmp_path):
    """Sum, place and loader position travel in the checkpoint, which loads with `weights_only=True`."""
    whole = RelevanceProbe(Recorder(), every_n_steps=4)
    fit(whole, data(), epochs=3)

    before = RelevanceProbe(Recorder(), every_n_steps=4)
    trainer, _ = fit(before, data(), epochs=2)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    after = RelevanceProbe(Recorder(), every_n_steps=4)
    fit(after, data(), epochs=3, ckpt_path=tmp_path / "cut.ckpt")

    assert before.probe.seen + after.probe.seen == whole.probe.seen
    assert torch.equal(after.take_sketch(), whole.take_sketch())
    file = io.BytesIO()
    torch.save(after.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).keys() == after.state_dict().keys()


def test_a_second_fit_with_the_same_callback_starts_anew_at_its_first_step():
    """What was due in an earlier fit, and what nobody took from it, is forgotten."""
    callback = RelevanceProbe(Recorder(), every_n_steps=6)
    fit(callback, Data())
    fit(callback, Data())

    assert callback.probe.seen == [[0.0], [0.0]]
    assert callback._count == 1


def test_the_server_prepares_the_probe():
    """Once on the driver, so that clients need not load anything."""
    callback = RelevanceProbe(Recorder())
    callback.prepare_server(Model(), global_branch=True)

    assert callback.probe.prepared == 1


def test_a_copy_made_in_the_middle_can_be_pickled_and_goes_on():
    """An open loader stays behind."""
    callback = RelevanceProbe(Recorder(), every_n_steps=3)
    fit(callback, WithProbeData())

    assert torch.equal(copy.deepcopy(callback).take_sketch(), callback.take_sketch())


def test_an_empty_probe_dataloader_is_an_error():
    """Not an endless loop."""

    class Empty(Data):
        def probe_dataloader(self):
            return []

    with pytest.raises(ValueError, match="probe_dataloader"):
        fit(RelevanceProbe(Recorder()), Empty())


def test_a_rhythm_below_one_step_is_refused():
    """Zero would divide, in other designs."""
    with pytest.raises(ValueError, match="every_n_steps"):
        RelevanceProbe(Recorder(), every_n_steps=0)
