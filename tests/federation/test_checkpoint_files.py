"""Checkpoints are whole or absent, and a damaged or foreign one is refused with what is wrong."""

import errno
import io
import os
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_pfl.errors import CheckpointMismatchError
from lightning_pfl.federation import ClientStore
from lightning_pfl.federation.checkpoint_files import CheckpointFiles
from tests.federation.runs import strategy_of, trainer_of
from tests.federation.test_resume import checkpoint_every_round, fit, outcome
from tests.federation.tiny import ClientsOwnData, Tiny

SAVED = {"epoch": 3, "weights": torch.arange(1000.0)}


@pytest.fixture
def path(tmp_path):
    CheckpointFiles().save_checkpoint(SAVED, tmp_path / "ck" / "last.ckpt")
    return tmp_path / "ck" / "last.ckpt"


def test_a_checkpoint_is_what_torch_reads_too(path):
    for loaded in (CheckpointFiles().load_checkpoint(path), torch.load(path, weights_only=True)):
        assert loaded["epoch"] == 3
        assert torch.equal(loaded["weights"], SAVED["weights"])
    assert os.listdir(path.parent) == ["last.ckpt"]


@pytest.mark.parametrize("url", ["memory://checkpoints/last.ckpt"])
def test_a_checkpoint_may_lie_elsewhere(url):
    CheckpointFiles().save_checkpoint(SAVED, url)
    assert CheckpointFiles().load_checkpoint(url)["epoch"] == 3
    CheckpointFiles().remove_checkpoint(url)
    with pytest.raises(FileNotFoundError, match="There is no checkpoint memory://"):
        CheckpointFiles().load_checkpoint(url)


def flipped(data):
    """One bit in the middle, which torch itself does not notice."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def code(data):
    class Runs:
        def __reduce__(self):
            return os.system, ("true",)

    stream = io.BytesIO()
    torch.save({"weights": Runs()}, stream)
    return stream.getvalue()


def tensor(data):
    stream = io.BytesIO()
    torch.save(torch.ones(2), stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flipped, "is damaged: it must have the sha256 .* but has .* Resume from an earlier checkpoint"),
        (lambda data: data[:-1], "is truncated, or no checkpoint at all: it has"),
        (lambda data: data[: len(data) // 2], "is truncated"),
        (lambda data: b"", "is truncated, or no checkpoint at all: it has 0 bytes"),
        (lambda data: data + b"more", "is truncated, or no checkpoint at all"),
        (lambda data: pickle.dumps({"epoch": 3}), "no checkpoint at all"),
        (code, "cannot be read as a checkpoint: .* might run code"),
        (tensor, "is no checkpoint: it holds a Tensor"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(path, damage, message):
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(CheckpointMismatchError, match=f"last.ckpt.*{message}"):
        CheckpointFiles().load_checkpoint(path)


def test_flipped_bits_are_not_noticed_by_torch_itself(path):
    """Why there is a digest at all."""
    path.write_bytes(flipped(path.read_bytes()))
    assert torch.load(path, weights_only=True)["epoch"] == 3


def test_a_checkpoint_without_a_digest_is_read_with_a_word(path, caplog):
    """Such as one that a user has edited."""
    torch.save(SAVED, path)
    assert CheckpointFiles().load_checkpoint(path)["epoch"] == 3
    assert "has no digest" in caplog.text


class Unwilling(io.FileIO):
    """A file on a disk that takes no more after so many bytes."""

    code = errno.ENOSPC
    room = 1000

    def write(self, data):
        if len(data) > self.room:
            super().write(data[: self.room])
            raise OSError(self.code, os.strerror(self.code))
        return super().write(data)


def refuse_to_open(path, mode):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


FAULTS = {"full": Unwilling, "read-only": refuse_to_open}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_write_that_fails_leaves_the_checkpoint_before(path, monkeypatch, fault):
    monkeypatch.setattr("lightning_pfl.federation.whole_files.open", FAULTS[fault], raising=False)

    with pytest.raises(OSError, match=r"cannot write a checkpoint of \d+ bytes: .*make room, and resume from it"):
        CheckpointFiles().save_checkpoint({"epoch": 4, "weights": torch.zeros(2000)}, path)

    assert os.listdir(path.parent) == ["last.ckpt"]
    assert CheckpointFiles().load_checkpoint(path)["epoch"] == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_whose_disk_fails_ends_and_goes_on_later_as_if_nothing_had_been(tmp_path, monkeypatch, fault):
    """The disk fails in the third round, while states are stored or while the checkpoint is written."""

    class DiskFails(L.Callback):
        federated_scope = "server"

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                monkeypatch.setattr("lightning_pfl.federation.whole_files.open", FAULTS[fault], raising=False)

    store = tmp_path / "states"
    with pytest.raises(OSError, match=r"cannot (store|write)"):
        fit(
            tmp_path / "ck",
            strategy_of(store=ClientStore(store, max_memory=0)),
            4,
            module=Tiny(),
            callbacks=[DiskFails()],
        )
    monkeypatch.undo()
    fit(tmp_path / "ck", strategy_of(store=ClientStore(store)), 4, module=Tiny(), ckpt_path="last")

    fit(tmp_path / "whole", strategy_of(store=ClientStore(tmp_path / "others")), 4, module=Tiny())
    got, expected = outcome(tmp_path / "ck" / "epoch=3.ckpt"), outcome(tmp_path / "whole" / "epoch=3.ckpt")
    assert got["federated"]["store"]["versions"] == expected["federated"]["store"]["versions"]
    assert not list(tmp_path.rglob("*.unfinished"))


def test_states_go_with_the_last_checkpoint_that_refers_to_them(tmp_path):
    """The newest checkpoint is kept: with it three states, and those of the turns that it was made after."""
    strategy = strategy_of(store=ClientStore(tmp_path / "states"))
    checkpoints = ModelCheckpoint(tmp_path / "ck", save_top_k=1)
    trainer = trainer_of(tmp_path, strategy, max_epochs=4, callbacks=[checkpoints], enable_checkpointing=True)

    trainer.fit(Tiny(), datamodule=ClientsOwnData())

    assert len(list((tmp_path / "ck").iterdir())) == 1
    assert len(list((tmp_path / "states").rglob("*.state"))) == 3


def test_a_run_that_goes_on_from_an_earlier_checkpoint_leaves_the_later_ones_whole(tmp_path):
    def go(rounds, **arguments):
        strategy = strategy_of(store=ClientStore(tmp_path / "states", max_memory=0))
        return fit(tmp_path / "ck", strategy, rounds, module=Tiny(), **arguments)

    go(4)
    # every state that it makes is there already, from before
    trainer = trainer_of(
        tmp_path,
        strategy_of(store=ClientStore(tmp_path / "states", max_memory=0)),
        max_epochs=4,
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(tmp_path / "elsewhere", every_n_epochs=10)],
    )
    trainer.fit(Tiny(), datamodule=ClientsOwnData(), ckpt_path=tmp_path / "ck" / "epoch=0.ckpt")

    for epoch in range(4):
        go(4, ckpt_path=tmp_path / "ck" / f"epoch={epoch}.ckpt")


# -- the last one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("callbacks", [[], "elsewhere"])
def test_to_go_on_from_a_last_checkpoint_that_is_not_there_is_refused(tmp_path, callbacks):
    """Lightning warns, and starts from zero."""
    callbacks = [checkpoint_every_round(tmp_path / "elsewhere")] if callbacks else []
    trainer = trainer_of(tmp_path, callbacks=callbacks, enable_checkpointing=bool(callbacks))

    with pytest.raises(CheckpointMismatchError, match=r"there is no last checkpoint in .*to start anew, leave"):
        trainer.fit(Tiny(), datamodule=ClientsOwnData(), ckpt_path="last")
    assert trainer.current_epoch == 0
