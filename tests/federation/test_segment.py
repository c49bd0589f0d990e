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
from tests.federation.tiny import Alternating, ClientsOwnData, Measures, Plateau, Tiny

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
    return plain_fit(module, data, callbacks=callbacks, **arguments)[0]


def plain_fit(module, data, *, callbacks=(), **arguments):
    """The same; returns the Trainer's metrics too."""
    trainer = trainer_for(callbacks, **arguments)
    trainer.strategy.client_id = "a"
    with ProcessSettings.capture().turn(seed=SEED, num_threads=1):
        trainer.fit(module, datamodule=data)
    return module.state_dict(), dict(trainer.callback_metrics)


def segments(module, data, **arguments):
    """The same in turns; returns the weights that the last turn leaves and the number of optimizer steps so far."""
    result = last_turn(module, data, **arguments)
    return result.update.shared.common.unpack(), unpack_state(result.state)["global_step"]


def last_turn(module, data, *, turns, callbacks=(), local_epochs=1, local_steps=None, rounds=None, **arguments):
    """The same; returns the last turn's result."""
    driver = trainer_for((), **arguments)
    template = ClientTemplate.take(driver)
    strategy = ClientStrategy(
        client_ids=("client-0",),
        share=["encoder", "head"],
        local_epochs=None if local_steps else local_epochs,
        local_steps=local_steps,
        accelerator=None,
        devices=None,
        precision=driver.precision_plugin,
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
    return result


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


@pytest.mark.parametrize(
    ("callback", "arguments"),
    [
        (lambda: EMAWeightAveraging(decay=0.8), {}),
        (lambda: StochasticWeightAveraging(0.02, swa_epoch_start=0.5, annealing_epochs=2), {}),
    ],
    ids=["EMA", "SWA"],
)
def test_callbacks_that_average_weights_end_once(callback, arguments):
    """Both copy their average into the model in `on_train_end`: at the end of the fit, not of every segment."""
    expected = long_fit(Tiny(), ClientsOwnData(), callbacks=[callback()], max_epochs=6)

    got, _ = segments(Tiny(), ClientsOwnData(), turns=6, callbacks=[callback()])

    assert_same_weights(got, expected)


def test_a_plateau_scheduler_remembers_a_metric_of_an_earlier_segment():
    """The metric is logged in every other epoch; in those between, the scheduler reads the value of the one before."""
    expected = long_fit(Plateau(), ClientsOwnData(), max_epochs=6)

    got, _ = segments(Plateau(), ClientsOwnData(), turns=6)

    assert_same_weights(got, expected)


@pytest.mark.parametrize(
    "arguments", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"precision": "bf16-true"}]
)
def test_arguments_of_the_trainer_hold_in_segments(arguments):
    expected = long_fit(Tiny(), ClientsOwnData(), max_epochs=4, **arguments)

    got, _ = segments(Tiny(), ClientsOwnData(), turns=4, **arguments)

    assert_same_weights(got, {name: value.float() for name, value in expected.items()})


def test_two_epochs_per_segment():
    expected = long_fit(Tiny(), ClientsOwnData(), max_epochs=6)

    got, _ = segments(Tiny(), ClientsOwnData(), turns=3, local_epochs=2, rounds=3)

    assert_same_weights(got, expected)


class OwnGenerator(ClientsOwnData):
    """The loader shuffles by a generator of its own, which no checkpoint of Lightning knows."""

    def train_dataloader(self):
        data = self._dataset(0)
        generator = torch.Generator().manual_seed(3)
        return DataLoader(data, self.batch_size, sampler=RandomSampler(data, generator=generator))


class Noisy(Tiny):
    """Draws random numbers in hooks that run once in a fit, and in others."""

    def setup(self, stage):
        torch.rand(3)

    def on_train_start(self):
        torch.rand(2)

    def on_train_epoch_start(self):
        torch.rand(1)


@pytest.mark.parametrize("local_steps", [None, 2], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    ("module", "data"),
    [
        (Tiny, ClientsOwnData),
        (Tiny, OwnGenerator),
        (Tiny, lambda: ClientsOwnData(num_workers=1)),
        (Noisy, ClientsOwnData),
        (Plateau, ClientsOwnData),
        (Alternating, ClientsOwnData),
    ],
    ids=["plain", "own generator", "workers", "noisy hooks", "plateau", "manual"],
)
def test_segments_end_anywhere(module, data, local_steps):
    """12 examples in batches of 4: with two steps a segment, most segments end inside an epoch."""
    if local_steps is None:
        arguments, turns = {"max_epochs": 4}, 4
    else:
        arguments, turns = {"max_steps": 12, "max_epochs": -1}, 6
    expected = long_fit(module(), data(), **arguments)

    got, steps = segments(module(), data(), turns=turns, local_steps=local_steps)

    assert_same_weights(got, expected)
    assert steps == 12 or module is Alternating


def test_gradients_that_pile_up_by_hand_are_carried_along():
    """The encoder steps at every second batch; with one step a segment, a segment ends at every batch."""
    expected = long_fit(Alternating(), ClientsOwnData(), max_steps=12, max_epochs=-1)

    got, steps = segments(Alternating(), ClientsOwnData(), turns=8, local_steps=1, rounds=12)

    assert_same_weights(got, expected)
    assert steps == 12  # eight batches: a step of the head at each, of the encoder at every second


@pytest.mark.parametrize("local_steps", [None, 2], ids=["epochs", "steps"])
def test_metrics_over_an_epoch_do_not_notice_the_segments(local_steps):
    arguments = {"max_epochs": 4} if local_steps is None else {"max_steps": 12, "max_epochs": -1}
    _, expected = plain_fit(Measures(), ClientsOwnData(), **arguments)

    result = last_turn(Measures(), ClientsOwnData(), turns=4 if local_steps is None else 6, local_steps=local_steps)

    got = {name.replace("_local", ""): value for name, value in result.metrics.items()}
    assert got == {name: float(value) for name, value in expected.items()}
    assert {"train_loss", "train_max", "train_error", "total", "val_loss"} <= got.keys()


SEEN = []


class Watch(L.Callback):
    """Notes in this process which hooks are called."""

    def __getattribute__(self, name):
        if name in ("setup", "on_fit_start", "on_train_start", "on_train_end", "on_fit_end", "teardown"):
            SEEN.append(name)
        return super().__getattribute__(name)


def test_the_end_of_a_fit_comes_once():
    """Hooks of start run in every segment, as on any resume; hooks of the end when the whole fit is over."""
    SEEN.clear()

    segments(Tiny(), ClientsOwnData(), turns=3, callbacks=[Watch()])

    assert {name: SEEN.count(name) for name in sorted(set(SEEN))} == {
        "on_fit_end": 1,
        "on_fit_start": 3,
        "on_train_end": 1,
        "on_train_start": 3,
        "setup": 3,
        "teardown": 1,
    }
