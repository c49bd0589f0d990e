"""What a process may lack: memory in one client, a device, a clock that can be trusted."""

import itertools
import time

import pytest
import torch

from lightning_pfl.errors import ClientFailedError
from lightning_pfl.federation import LocalPool, RoundRules
from tests.federation.places import Eventful, job, snapshot_of
from tests.federation.runs import strategy_of, trainer_of
from tests.federation.test_rounds import Watch, states
from tests.federation.tiny import ClientsOwnData, Tiny


class Greedy(Tiny):
    """Client `c` asks for more memory than any machine has."""

    def training_step(self, batch, batch_idx):
        if self.trainer.strategy.client_id == "c":
            torch.empty(2**60, dtype=torch.uint8)
        return super().training_step(batch, batch_idx)


def test_a_client_without_memory_fails_and_the_round_goes_on_if_the_user_said_so(tmp_path, caplog):
    strategy = strategy_of("abc", aggregator=Watch(), rules=RoundRules(quorum=0.6))
    trainer_of(tmp_path, strategy, max_epochs=2, limit_val_batches=0).fit(Greedy(), datamodule=ClientsOwnData())

    assert [[client_id for client_id, _, _ in round] for round in strategy.aggregator.seen] == [["a", "b"]] * 2
    assert "allocate" in strategy.left_out[0].reason
    assert strategy.store.ids() == ["a", "b"]

    strict = strategy_of("abc")
    with pytest.raises(ClientFailedError, match="Client `c` failed in round 0"):
        trainer_of(tmp_path, strict, limit_val_batches=0).fit(Greedy(), datamodule=ClientsOwnData())


def test_a_device_that_is_gone_is_no_fault_of_the_client(tmp_path):
    """A pool with other places runs it again there; here there is none."""
    pool = LocalPool()
    pool.start([], {"model": snapshot_of(Eventful(str(tmp_path)), None)})

    (lost,) = pool.run([job("loses-its-gpu")])
    (again,) = pool.run([job("loses-its-gpu")])

    assert lost.failure.lost
    assert "CUDA error: device unavailable" in lost.failure.trace
    assert again.failure is None


def test_clocks_that_jump_change_nothing(tmp_path, monkeypatch):
    """Every reading of the wall clock is a day later or earlier; deadlines are of another clock."""
    rules = RoundRules(deadline=3600)
    expected = strategy_of("abc", rules=rules)
    trainer_of(tmp_path, expected, max_epochs=2).fit(Tiny(), datamodule=ClientsOwnData())

    days = itertools.cycle([86_400.0, -86_400.0, 0.0])
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(days))
    strategy = strategy_of("abc", rules=rules)
    trainer_of(tmp_path, strategy, max_epochs=2).fit(Tiny(), datamodule=ClientsOwnData())

    assert states(strategy) == states(expected)
    assert strategy.left_out == []
