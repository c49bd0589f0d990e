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

from lightning_pfl.callbacks.federated import SketchSource
from lightning_pfl.callbacks.relevance_probe import RelevanceProbe
from lightning_pfl.functional.mechanisms import ClientNoise, ExampleNoise, SketchBound
from lightning_pfl.relevance.base import ExampleProbe, Probe


@pytest.fixture(autouse=True)
def quiet(caplog):
    """For these tests alone: a level that a module sets stays for all others of the process."""
    caplog.set_level(logging.ERROR, logger="lightning.pytorch")


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


class Rows(ExampleProbe):
    """An example's sketch is the number that it is, twice; the bound is promised, and not kept."""

    def __init__(self, max_norm=1000.0):
        self.bound = max_norm
        self.seen = []

    @property
    def size(self):
        return 2

    @property
    def max_norm(self):
        return self.bound

    def prepare(self):
        pass

    def sketch(self, batch):
        raise AssertionError("examples are asked for one by one")

    def sketches(self, batch):
        torch.rand(5), random.random(), numpy.random.rand()
        value = batch[0] if isinstance(batch, list | tuple) else batch
        self.seen += value.flatten().tolist()
        return value.float().reshape(-1, 1).expand(-1, 2).clone()


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


def bounded(probe=None, **arguments):
    """A callback whose sketches will be noised example by example."""
    callback = RelevanceProbe(probe or Rows(), **{"every_n_steps": 1, **arguments})
    callback.prepare_noise(ExampleNoise(1.0))
    return callback


class InBatches(Data):
    """Ten numbers from 0 on, four in a batch, so that the last has two."""

    def __init__(self, repeats=False):
        super().__init__(10)
        self.repeats = repeats

    def train_dataloader(self):
        drawn = torch.utils.data.RandomSampler(self.numbers, replacement=True) if self.repeats else None
        return DataLoader(TensorDataset(self.numbers), batch_size=4, shuffle=not self.repeats, sampler=drawn)


@pytest.mark.parametrize("repeats", [False, True])
def test_every_example_counts_the_same_and_once_per_pass(repeats):
    """Mean of 0 .. 9 is 4.5, whatever batch each was in; a training that draws with replacement has no part in it."""
    callback = bounded()
    fit(callback, InBatches(repeats))

    assert sorted(callback.probe.seen) == list(range(10))
    torch.testing.assert_close(callback.take_sketch(), torch.tensor([4.5, 4.5], dtype=torch.float64))
    assert callback.take_bound() == SketchBound(1000.0, 10, 1)


def test_a_turn_over_two_passes_says_that_an_example_may_be_in_it_twice():
    """Three batches a pass, six sketched; a second turn begins at its own pass and counts from there."""
    callback = bounded()
    fit(callback, InBatches(), epochs=2)
    callback.take_sketch()

    assert callback.take_bound() == SketchBound(1000.0, 20, 2)

    callback = bounded(every_n_steps=2)  # steps 0, 2, 4: one pass of three batches in two epochs
    fit(callback, InBatches(), epochs=2)
    callback.take_sketch()
    assert callback.take_bound() == SketchBound(1000.0, 10, 1)


def test_the_order_does_not_depend_on_what_the_training_has_drawn():
    """An example with a longer text makes dropout draw more, and the next shuffle another one."""

    class Wasteful(InBatches):
        def train_dataloader(self):
            torch.rand(int(self.numbers.sum()))
            return super().train_dataloader()

    plain, wasteful = bounded(), bounded()
    fit(plain, InBatches(), epochs=2)
    fit(wasteful, Wasteful(), epochs=2)

    assert plain.probe.seen == wasteful.probe.seen
    assert plain.probe.seen[:10] != plain.probe.seen[10:]


def test_one_examples_part_is_bounded_whatever_the_probe_promises():
    """By hand: nine zeros and 10^6 twice, cut to length 5, are 0.5 / sqrt(2) each on average."""

    class Spike(InBatches):
        def __init__(self):
            super().__init__()
            self.numbers = torch.zeros(10, 1)
            self.numbers[3] = 1e6

    callback = bounded(Rows(max_norm=5.0))
    fit(callback, Spike())

    torch.testing.assert_close(callback.take_sketch().float(), torch.full((2,), 0.5 / 2**0.5))


def test_replacing_one_example_of_a_real_training_moves_its_sketch_no_further_than_the_sensitivity():
    """Through the callback, its loader and a real probe; in 2 passes, with outliers, for each of 6 examples."""
    from lightning_pfl.relevance import GradientProbe

    def sketched(numbers):
        torch.manual_seed(0)
        probe = GradientProbe(
            nn.Linear(1, 1),
            lambda module, batch: module(batch[0]).square().mean(),
            parameters=["weight", "bias"],
            size=4,
            max_norm=0.5,
        )
        callback = bounded(probe)
        data = InBatches()
        data.numbers = numbers
        fit(callback, data, epochs=2)
        return callback.take_sketch(), callback.take_bound()

    numbers = torch.linspace(-2, 2, 6)[:, None]
    sketch, bound = sketched(numbers)
    limit = ExampleNoise(1.0).sensitivity(bound)
    assert limit == pytest.approx(2 * 0.5 * 2 / 12)
    moved = []
    for place in range(6):
        for value in (0.0, -100.0):
            neighbour = numbers.clone()
            neighbour[place] = value
            moved.append((sketched(neighbour)[0] - sketch).norm().item())

    assert max(moved) <= limit
    assert max(moved) > limit / 4


def test_a_probe_dataloader_and_to_probe_supply_bounded_examples_too():
    """Each in its turn; `to_probe` maps training batches."""
    loaded = bounded()
    fit(loaded, WithProbeData())
    assert sorted(map(round, loaded.probe.seen[:10])) == list(range(100, 110))

    mapped = bounded(to_probe=lambda batch: batch[0] + 50)
    fit(mapped, InBatches())
    assert sorted(mapped.probe.seen) == list(range(50, 60))


def test_training_goes_on_to_the_same_bits_with_bounded_sketches_as_without():
    _, plain = fit(None, InBatches())
    _, probed = fit(bounded(), InBatches())

    assert all(map(torch.equal, plain, probed))


def test_a_bounded_turn_cut_in_two_gives_the_same_sketch_and_bound(tmp_path):
    whole = bounded()
    fit(whole, InBatches(), epochs=3)
    before, after = bounded(), bounded()
    trainer, _ = fit(before, InBatches(), epochs=2)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    fit(after, InBatches(), epochs=3, ckpt_path=tmp_path / "cut.ckpt")

    assert torch.equal(after.take_sketch(), whole.take_sketch())
    assert after.take_bound() == whole.take_bound() == SketchBound(1000.0, 30, 3)


def test_an_example_counts_once_whatever_is_made_of_it():
    """By hand: numbers below 5 are left out, and so are zero; the others have two views, x and x + 4, cut to length 6.

    Their mean x + 2, twice, is longer than 6 for each of 5 .. 9; so five of ten examples add 6 / sqrt(2).
    """

    def views(batch):
        return torch.cat([batch[0], batch[0] + 4]) if batch[0] >= 5 else batch[0][:0]

    callback = bounded(Rows(max_norm=6.0), to_probe=views)
    fit(callback, InBatches())

    torch.testing.assert_close(callback.take_sketch().float(), torch.full((2,), 3 / 2**0.5))
    assert callback.take_bound() == SketchBound(6.0, 10, 1)


def test_an_example_is_alone_in_its_batch_so_that_no_other_ones_length_moves_it():
    """A collate function that pads to the longest, in front: GPT-2 would number the positions anew."""

    def padded(texts):
        longest = max(map(len, texts))
        return torch.stack([nn.functional.pad(text, (longest - len(text), 0)) for text in texts])

    class Texts(Data):
        def probe_dataloader(self):
            return DataLoader([torch.ones(1), torch.ones(2), torch.ones(9)], batch_size=3, collate_fn=padded)

    seen = []

    class Shapes(Rows):
        def sketches(self, batch):
            seen.append(tuple(batch.shape))
            return torch.zeros(1, 2)

    fit(bounded(Shapes(), every_n_steps=6), Texts())

    assert sorted(seen) == [(1, 1), (1, 2), (1, 9)]


def test_noise_on_examples_asks_for_a_probe_that_tells_them_apart_and_bounds_them():
    with pytest.raises(ValueError, match="a Recorder does not tell them apart"):
        bounded(Recorder())
    with pytest.raises(ValueError, match=r"Write `Rows\(..., max_norm=C\)`"):
        bounded(Rows(max_norm=None))

    class Other(SketchSource):
        def take_sketch(self):
            return None

    with pytest.raises(ValueError, match="Other does not say how far one moves its sketch"):
        Other().prepare_noise(ExampleNoise(1.0))
    Other().prepare_noise(ClientNoise(1.0))
    RelevanceProbe(Recorder()).prepare_noise(ClientNoise(1.0))


def test_a_callback_forgets_the_noise_of_an_earlier_run():
    callback = bounded()
    callback.prepare_noise(None)
    callback.probe = Recorder()
    fit(callback)

    assert callback.take_sketch() is not None
    assert callback.take_bound() is None
