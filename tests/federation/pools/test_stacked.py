"""What is particular to clients that train several at once."""

import logging
import os
import re
import signal
import threading

import numpy as np
import pytest
import torch
from torch import nn

from lightning_pfl.federation import Client
from lightning_pfl.federation.pools import LocalPool, StackedPool, stacked
from lightning_pfl.federation.tensor_file import TensorFile
from lightning_pfl.federation.turn import unpack_state
from lightning_pfl.functional.stacking import stackable
from tests.federation.places import bytes_of, job, snapshot_of
from tests.federation.tiny import Tiny

FOUR = ["a", "b", "c", "d"]


class Plain(Tiny):
    """No dropout, so that losses can be stacked; steps that rounding does not turn around."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Identity()
        self.backbone = nn.Parameter(torch.eye(4).repeat(80, 80), requires_grad=False)  # lies in the tensor file

    def forward(self, x):
        return super().forward(x @ self.backbone[:4, :4])

    def configure_optimizers(self):
        return torch.optim.SGD([one for one in self.parameters() if one.requires_grad], lr=0.05, momentum=0.9)


class ByClient(Plain):
    """A frozen number of each client's own."""

    def setup(self, stage):
        self.register_buffer("shift", torch.tensor(float(ord(self.trainer.strategy.client_id))) / 100)

    def loss_of(self, batch):
        return super().loss_of(batch) + (self.shift * self.head.weight).square().sum()


class Teacher(Plain):
    """A frozen copy of the head that follows it, written to as `how` says."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.teacher = nn.Linear(8, 1).requires_grad_(False)
        self.teacher.load_state_dict(self.head.state_dict())

    def loss_of(self, batch):
        lesson = self.teacher(torch.tanh(self.encoder(batch[0])))
        return super().loss_of(batch) + nn.functional.mse_loss(self(batch[0]), lesson)

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            to = self.teacher.weight.data if self.how == "data" else self.teacher.weight
            to.mul_(0.5).add_(0.5 * self.head.weight)


class Draws(Plain):
    """Noise from all generators around the loss."""

    def training_step(self, batch, batch_idx):
        noise = torch.rand(()).item() + np.random.randn()
        loss = stackable(self.loss_of, (batch[0] + noise, batch[1]))
        self.log("drawn", torch.rand(()).item() + np.random.randn(), on_step=True)
        return loss


class Logs(Plain):
    def loss_of(self, batch):
        loss = super().loss_of(batch)
        self.log("inside", loss)
        return loss


class Normalised(Plain):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return super().forward(self.norm(x))


class Counts(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def loss_of(self, batch):
        self.calls += 1
        return super().loss_of(batch)


class Wrong(Plain):
    """Goes wrong in the middle of its first epoch."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 1 and self.trainer.strategy.client_id == "b":
            self.go_wrong()
        return super().training_step(batch, batch_idx)

    def go_wrong(self):
        raise ZeroDivisionError("what b did")


class Interrupts(Wrong):
    def go_wrong(self):
        raise KeyboardInterrupt


class IsSent(Wrong):
    """Ctrl-C reaches the main thread, while this one works on."""

    def go_wrong(self):
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            pass


@pytest.fixture
def companies(monkeypatch):
    """How many clients each stack was of."""
    found, compute = [], stacked.losses_and_gradients

    def count(parts, own):
        found.append(len(parts))
        return compute(parts, own)

    monkeypatch.setattr(stacked, "losses_and_gradients", count)
    return found


def turns_at_work():
    """Threads of the pool; whoever else has one in this process is not asked."""
    return [one for one in threading.enumerate() if one.name == "turn"]


@pytest.fixture(autouse=True)
def nobody_is_left():
    yield
    assert not turns_at_work()


def run(pool, module, tmp_path, rounds=2, **settings):
    """Results of the last round, by client."""
    states, results = {}, {}
    with TensorFile(tmp_path) as file:
        pool.start([Client(one) for one in FOUR], {"model": snapshot_of(module, file, **settings)})
        for round in range(rounds):
            jobs = [job(one, round=round, state=states.get(one)) for one in FOUR]
            results = {result.client_id: result for result in pool.run(jobs)}
            states = {name: result.state for name, result in results.items()}
        pool.close()
    return results


def assert_close(got, expected):
    for name, result in expected.items():
        assert got[name].failure is None, got[name].failure.trace
        one, other = (unpack_state(of.state)["state_dict"] for of in (got[name], result))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert got[name].metrics == pytest.approx(result.metrics, rel=1e-4)


@pytest.mark.parametrize("module", [Plain, ByClient, lambda: Teacher("in place"), Draws])
def test_clients_that_train_at_once_end_as_clients_that_train_one_after_another(tmp_path, companies, module):
    expected = run(LocalPool(), module(), tmp_path)
    assert companies == []
    assert_close(run(StackedPool(), module(), tmp_path), expected)
    assert companies == [4] * 6  # two rounds of three steps


def test_of_an_odd_number_the_last_is_alone(tmp_path, companies):
    expected = run(LocalPool(), Plain(), tmp_path, rounds=1)
    assert_close(run(StackedPool(at_once=3), Plain(), tmp_path, rounds=1), expected)
    assert companies == [3, 3, 3]


def test_one_at_a_time_is_the_same_bytes(tmp_path, companies):
    expected = run(LocalPool(), Plain(), tmp_path)
    got = run(StackedPool(at_once=1), Plain(), tmp_path)
    assert {name: bytes_of(one) for name, one in got.items()} == {name: bytes_of(one) for name, one in expected.items()}
    assert companies == []


@pytest.mark.parametrize(
    ("module", "reason"),
    [(Tiny, "random"), (Logs, "calls `self.log`"), (Normalised, "`norm` .* keeps running statistics")],
)
def test_what_cannot_be_stacked_is_the_same_bytes_and_says_so_once(tmp_path, caplog, module, reason):
    expected = run(LocalPool(), module(), tmp_path)
    with caplog.at_level(logging.WARNING, logger="lightning_pfl"):
        got = run(StackedPool(), module(), tmp_path)
    assert {name: bytes_of(one) for name, one in got.items()} == {name: bytes_of(one) for name, one in expected.items()}
    (message,) = [one.getMessage() for one in caplog.records if "one client at a time" in one.getMessage()]
    assert f"`{module.__name__}.loss_of`" in message
    assert re.search(reason, message)


def test_a_loss_that_writes_to_its_module_fails_by_name(tmp_path):
    failures = [one.failure.trace for one in run(StackedPool(), Counts(), tmp_path, rounds=1).values() if one.failure]
    assert len(failures) == 3  # each that was to compute for others; the last is alone
    assert all("`Counts.loss_of` is computed for several clients at once" in one and "calls" in one for one in failures)


def test_a_frozen_tensor_that_changes_unseen_ends_the_run(tmp_path):
    with pytest.raises(RuntimeError, match=r"`teacher.weight` is frozen, .* changed it through `.data`"):
        run(StackedPool(), Teacher("data"), tmp_path)


def test_a_client_that_raises_takes_nobody_along_and_another_joins_in_its_place(tmp_path, companies):
    expected = run(LocalPool(), Plain(), tmp_path, rounds=1)
    got = run(StackedPool(at_once=3), Wrong(), tmp_path, rounds=1)
    assert "ZeroDivisionError: what b did" in got.pop("b").failure.trace
    expected.pop("b")
    assert_close(got, expected)
    assert companies == [3, 3, 3]  # a, b and c; then d makes its first step with the second of a and c


@pytest.fixture
def listens_to_ctrl_c():
    """A shell lets what it starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listens_to_ctrl_c")
@pytest.mark.parametrize("module", [Interrupts, IsSent])
def test_ctrl_c_stops_all_turns_and_leaves_the_process_as_it_was(tmp_path, module):
    with TensorFile(tmp_path) as file:
        snapshots = {"model": snapshot_of(module(), file)}
        pool = StackedPool()
        pool.start([Client(one) for one in FOUR], snapshots)
        torch.manual_seed(3)
        pool.submit([job(one) for one in FOUR])
        with pytest.raises(KeyboardInterrupt):
            pool.next()
        assert not turns_at_work()
        assert torch.initial_seed() == 3
        assert torch.is_grad_enabled()
        assert pool.next() is None
        (result,) = pool.run([job("a")])
        bytes_of(result)
        pool.close()


@pytest.mark.parametrize("end", [lambda pool: pool.cancel(FOUR), lambda pool: pool.close()], ids=["cancel", "close"])
def test_turns_that_wait_are_ended(tmp_path, end):
    with TensorFile(tmp_path) as file:
        pool = StackedPool()
        pool.start([Client(one) for one in FOUR], {"model": snapshot_of(Wrong(), file)})
        pool.submit([job(one) for one in FOUR])
        assert pool.next().client_id == "b"  # the others wait for their second step
        assert len(turns_at_work()) == 3
        torch.manual_seed(3)
        end(pool)
        assert not turns_at_work()
        assert torch.initial_seed() == 3
        assert pool.next() is None
        pool.close()


def test_clients_of_two_models_are_stacked_by_model(tmp_path, companies):
    class Wide(Plain):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.Linear(4, 16), nn.Linear(16, 1)

    with TensorFile(tmp_path) as file:
        pool = StackedPool()
        pool.start([Client(one) for one in FOUR], {"one": snapshot_of(Plain(), file), "two": snapshot_of(Wide(), file)})
        for result in pool.run([job(one, snapshot=kind) for one, kind in zip(FOUR, ["one", "two"] * 2, strict=True)]):
            bytes_of(result)
        pool.close()
    assert companies == [2] * 6


def test_a_pool_says_how_many_it_trains_at_once_and_refuses_none():
    assert StackedPool(at_once=3).look([Client(one) for one in FOUR])._places == 3
    with pytest.raises(ValueError, match=r"`at_once` .* is 0"):
        StackedPool(at_once=0)


def test_accumulation_and_clipping_are_each_clients_own(tmp_path, companies):
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
    expected = run(LocalPool(), Plain(), tmp_path, **settings)
    assert_close(run(StackedPool(), Plain(), tmp_path, **settings), expected)
    assert companies == [4] * 6
