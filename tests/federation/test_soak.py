"""The short form of `benchmarks/soak.py`: with random faults, nothing grows and the bytes come out the same."""

import gc
import logging
from types import BuiltinFunctionType, FunctionType, ModuleType

import lightning as L
import pytest

from benchmarks.soak import quiet, soak
from tests.federation.runs import strategy_of, trainer_of
from tests.federation.tiny import ClientsOwnData, Tiny


@pytest.fixture(autouse=True)
def levels(caplog):
    """Restored by `caplog`, as quiet changes levels."""
    before = {name: logging.getLogger(name).level for name in ("lightning", "lightning.pytorch", "lightning_pfl")}
    quiet()
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def test_random_faults_change_no_bytes_and_leave_nothing_behind(tmp_path):
    whole = soak(20, 4, rate=0.0, driver=0.0, seed=0, folder=tmp_path / "whole")
    faulty = soak(20, 4, rate=0.05, driver=0.1, seed=0, folder=tmp_path / "faulty")
    assert faulty.resumed > 0  # and did not begin anew each time

    assert faulty.digest == whole.digest
    assert len(faulty.faults) >= 3, faulty.faults  # kinds of faults
    for outcome in (whole, faulty):
        growth = outcome.growth()
        assert growth["files"] <= 0
        assert growth["threads"] <= 0
        assert growth["memory"] < 8  # MiB; a long form shows less


class Reachable(L.Callback):
    """Counts what a driver holds after some rounds."""

    federated_scope = "server"

    def __init__(self, rounds):
        self.count = dict.fromkeys(rounds)

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch in self.count:
            self.count[trainer.current_epoch] = len(reachable_from(trainer))


def reachable_from(root):
    """Ids of all objects that an object holds, but for code and what belongs to the whole process."""
    skipped = (ModuleType, FunctionType, BuiltinFunctionType, type, logging.Logger)
    gc.collect()
    found, new = {id(root)}, [root]
    while new:
        held = [one for one in gc.get_referents(*new) if not issubclass(type(one), skipped)]
        unique = {id(one): one for one in held}
        new = [one for number, one in unique.items() if number not in found]
        found |= unique.keys()
    return found


def test_what_a_driver_holds_does_not_grow_with_rounds(tmp_path, monkeypatch):
    """From reading to reading the names of six blocks make 42 objects; one small thing per round would make 60 more."""
    monkeypatch.setattr("lightning_pfl.federation.round_log._MANY", 20)
    reachable = Reachable([25, 85])

    trainer = trainer_of(
        tmp_path, strategy_of("ab"), max_epochs=86, limit_val_batches=0, limit_train_batches=1, callbacks=[reachable]
    )
    trainer.fit(Tiny(), datamodule=ClientsOwnData())

    before, after = reachable.count.values()
    assert before > 1000  # it does look into things
    assert after - before < 70
