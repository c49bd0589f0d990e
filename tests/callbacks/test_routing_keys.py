"""Promises of `lightning_pfl.callbacks.routing_keys`."""

import io
import logging
import random

import numpy
import pytest
import torch

from lightning_pfl.callbacks.routing_keys import RoutingKeys
from lightning_pfl.functional.routing import Keys
from lightning_pfl.relevance.base import Reader
from tests.callbacks.test_relevance_probe import Data, fit


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR, logger="lightning.pytorch")


class Numbers(Reader):
    """A question is the number that it is, and ten times that; random numbers are wasted."""

    def __init__(self, width=2):
        self.width = width

    def prepare(self):
        pass

    def read(self, batch):
        torch.rand(5), random.random(), numpy.random.rand()
        value = batch[0] if isinstance(batch, list | tuple) else batch
        return value.float().reshape(-1, 1) * torch.linspace(1, 10, self.width)


def numbers_of(keys):
    """How many questions there are, and their means' first coordinates."""
    return sorted(zip(keys[:, 1].tolist(), keys[:, 0].tolist(), strict=True))


def test_every_nth_steps_questions_are_gathered_over_all_rounds():
    """Steps 0, 2, 4 of six, twice: the numbers 0, 2 and 4; keys are those of all questions, not of the last turn."""
    callback = RoutingKeys(Numbers(), every_n_steps=2, num_keys=3)
    fit(callback, epochs=2)

    assert numbers_of(callback.take_keys()) == [(0.0, 2.0), (2.0, 2.0), (4.0, 2.0)]
    assert torch.equal(callback.take_keys(), callback.take_keys())


def test_nothing_is_sent_before_anything_was_read():
    assert RoutingKeys(Numbers()).take_keys() is None


def test_there_are_no_more_groups_than_asked_for():
    callback = RoutingKeys(Numbers(), num_keys=2)
    fit(callback, Data(batches=7))

    keys = callback.take_keys()

    assert keys.shape == (2, 5)
    assert keys[:, 0].sum() == 7


def test_training_is_the_same_to_the_last_bit():
    _, plain = fit(None)
    _, read = fit(RoutingKeys(Numbers()))
    assert all(torch.equal(one, other) for one, other in zip(plain, read, strict=True))


def test_a_turn_that_is_cut_goes_on_with_what_it_had():
    whole = RoutingKeys(Numbers(), every_n_steps=2)
    fit(whole, epochs=2)

    first = RoutingKeys(Numbers(), every_n_steps=2)
    fit(first)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = RoutingKeys(Numbers(), every_n_steps=2)
    second.load_state_dict(torch.load(file, weights_only=True))
    second._last_step = None  # the second fit counts its steps from 0
    second.setup(None, None, "validate")  # only a new fit forgets
    for step in (0, 2, 4):
        second._pending.append(second.read(torch.tensor([float(step)])))

    assert torch.equal(second.take_keys(), whole.take_keys())


def test_a_new_fit_starts_anew():
    callback = RoutingKeys(Numbers())
    fit(callback)
    fit(callback, Data(batches=2))
    assert callback.take_keys()[:, 0].sum() == 2


def test_many_questions_are_kept_as_groups_and_none_is_lost(monkeypatch):
    monkeypatch.setattr("lightning_pfl.callbacks.routing_keys._PENDING", 4)
    callback = RoutingKeys(Numbers(), num_keys=1)
    fit(callback, Data(batches=11))

    assert sum(map(len, callback._pending)) < 4
    expected = Keys.of(callback.reader.read(torch.arange(11.0)), limit=1).rows
    torch.testing.assert_close(callback.take_keys(), expected)


def test_long_readings_are_projected_alike_by_all_clients_and_short_ones_kept():
    one, two = RoutingKeys(Numbers(40), size=8), RoutingKeys(Numbers(40), size=8)
    batch = torch.tensor([1.0, 2.0])
    assert one.read(batch).shape == (2, 8)
    assert torch.equal(one.read(batch), two.read(batch))
    assert not torch.equal(one.read(batch), RoutingKeys(Numbers(40), size=8, seed=1).read(batch))
    assert torch.equal(RoutingKeys(Numbers(3), size=8).read(batch), Numbers(3).read(batch))


def test_batches_are_turned_into_what_the_reader_takes():
    callback = RoutingKeys(Numbers(), to_reader=lambda batch: batch["number"])
    assert callback.read({"number": torch.tensor([3.0])}).tolist() == [[3.0, 30.0]]


@pytest.mark.parametrize("name", ["every_n_steps", "num_keys", "size"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1"):
        RoutingKeys(Numbers(), **{name: 0})
