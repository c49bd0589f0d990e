"""Segments that follow each other are one long fit, bit for bit."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, RandomSampler

from lightning_pfl.federation.client_strategy import ClientStrategy
from lightning_pfl.federation.jobs import Job
from lightning_pfl.federation.pools.isolation import ProcessSettings
from lightning_pfl.federation.snapshot import Snapshot
from lightning_pfl.federation.sources import ClientData
from lightning_pfl.federation.template import ClientTemplate
from lightning_pfl.federation.tensor_file import TensorFile
from lightning_pfl.federation.turn import run_job, unpack_state
from lightning_pfl.types import Assignment
from tests.federation.tiny import ClientsOwnData, Tiny, dataset

SEED = 7


def trainer_for(callbacks=(), **arguments):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet, **arguments)


def long_fit(module, data, *, callbacks=(), **arguments):
    """One plain Lightning fit, in the random stream of the client."""
    trainer = trainer_for(callbacks, **arguments)
    trainer.strategy.client_id = "a"
    with ProcessSettings.capture().turn(seed=SEED, num_threads=1):
        trainer.fit(module, datamodule=data)
    return module.state_dict()


def segments(module, data, *, turns, callbacks=(), local_epochs=1, local_steps=None, rounds=None, **arguments):
    """The same in turns; returns the weights that the last turn leaves and the number of optimizer steps so far."""
    template = ClientTemplate.take(trainer_for((), **arguments))
    strategy = ClientStrategy(
        num_clients=1,
        share=["encoder", "head"],
        local_epochs=None if local_steps else local_epochs,
        local_steps=local_steps,
        accelerator=None,
        devices=None,
        precision=None,
    )
    trainer = template.equip(
        strategy, callbacks=callbacks, save_dir=None, has_logger=False, max_epochs=rounds or turns, min_epochs=None
    )
    state, file = None, TensorFile()
    snapshot = Snapshot.take((trainer, module, ClientData(data)), file)
    for number in range(turns):
        job = Job(Assignment("a", number), TrainerFn.FITTING, "model", state, SEED)
        with ProcessSettings.capture().turn(seed=SEED, num_threads=1):
            result = run_job(snapshot, job)
        assert result.failure is None, result.failure.trace
        state = result.state
        torch.rand(number + 1)  # what others do with the process's random stream is of no interest
    file.close()
    return result.update.shared.common.unpack(), unpack_state("a", state)["global_step"]


def assert_same_weights(got, expected):
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_six_segments_are_one_fit_of_six_epochs():
    """AdamW, OneCycle sized by the whole horizon, dropout and shuffling."""
    expected = long_fit(Tiny(), ClientsOwnData(), max_epochs=6)

    got, steps = segments(Tiny(), ClientsOwnData(), turns=6)

    assert_same_weights(got, expected)
    assert steps == 6 * 3
