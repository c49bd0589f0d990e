"""A client trains on what its stream brings, round by round, however the run is cut into turns."""

import logging

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import TensorDataset

from lightning_pfl.data import CountReplay, DynamicStream, NewRowsOnly, StreamDataModule
from lightning_pfl.federation import Client
from tests.federation.runs import assert_equal_states, strategy_of, trainer_of
from tests.federation.test_resume import StopAfter
from tests.federation.tiny import Tiny


class Recording(Tiny):
    """Remembers the row numbers that it was trained on; in its state, so that they travel in the checkpoint."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.full((6, 6), -1))

    def training_step(self, batch, batch_idx):
        x, y, number = batch
        self.rows[self.current_epoch, 2 * batch_idx : 2 * batch_idx + 2] = number
        return super().training_step((x, y), batch_idx)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def task(first, count):
    generator = torch.Generator().manual_seed(first)
    return TensorDataset(
        torch.randn(count, 4, generator=generator),
        torch.randn(count, 1, generator=generator),
        torch.arange(first, first + count),
    )


def stream_data(sizes=(8, 8), rounds_per_task=2, **settings):
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    tasks = [task(start, size) for start, size in zip(starts, sizes, strict=True)]
    settings = {"num_steps": 3, "batch_size": 2, **settings}
    return StreamDataModule(tasks, DynamicStream(sizes, rounds_per_task), **settings)


def fit(tmp_path, clients, *, rounds=4, ckpt_path=None, callbacks=(), **strategy):
    strategy = strategy_of([Client(name, datamodule=data) for name, data in clients.items()], **strategy)
    trainer = trainer_of(
        tmp_path,
        strategy,
        max_epochs=rounds,
        callbacks=[ModelCheckpoint(tmp_path, filename="last"), *callbacks],
        enable_checkpointing=True,
    )
    module = Recording()
    trainer.fit(module, ckpt_path=ckpt_path)
    return {name: strategy.personalize(module, name).rows for name in clients}, trainer


def test_a_client_trains_on_what_has_come_so_far(tmp_path):
    """Rounds of four new rows each and three batches of two; nothing comes before its round."""
    remembers, forgets = stream_data(replay=CountReplay(temperature=100)), stream_data(replay=NewRowsOnly())
    seen, _ = fit(tmp_path, {"a": remembers, "b": forgets})
    stream = stream_data().stream

    known = set()
    for round in range(4):
        new = set(stream.new_rows(round).tolist())
        known |= new
        assert set(seen["a"][round].tolist()) <= known
        assert set(seen["b"][round].tolist()) == new
    assert set(seen["a"][3].tolist()) - new  # the memory was used


def test_two_clients_with_the_same_rows_draw_differently(tmp_path):
    seen, _ = fit(tmp_path, {"a": stream_data(), "b": stream_data()})

    assert not torch.equal(seen["a"], seen["b"])


def test_a_run_that_is_stopped_and_resumed_trains_on_the_same_rows_to_the_same_bits(tmp_path):
    """The memory and its counts travel in the client's checkpoint."""
    whole, _ = fit(tmp_path / "whole", {"a": stream_data(), "b": stream_data()})
    fit(tmp_path / "cut", {"a": stream_data(), "b": stream_data()}, callbacks=[StopAfter(2)])
    resumed, trainer = fit(
        tmp_path / "cut", {"a": stream_data(), "b": stream_data()}, ckpt_path=tmp_path / "cut" / "last.ckpt"
    )

    assert trainer.current_epoch == 4
    for name in ("a", "b"):
        assert torch.equal(resumed[name], whole[name])
        assert (whole[name][:4] >= 0).all()
    one, other = (
        torch.load(tmp_path / folder / "last.ckpt", weights_only=True)["federated"] for folder in ("whole", "cut")
    )
    assert_equal_states(other, one)


def test_rounds_without_data_are_sat_out_logged_and_counted(tmp_path, caplog):
    """The second task is an idle slot: rounds 2 and 3. The other client goes on; the run ends with finite weights."""
    idle = stream_data(sizes=(8, 0, 8))
    with caplog.at_level(logging.WARNING, logger="lightning_pfl.data"):
        seen, trainer = fit(tmp_path, {"a": idle, "b": stream_data(sizes=(8, 8, 8))}, rounds=6)

    told = [record.getMessage() for record in caplog.records if "sits it out" in record.getMessage()]
    assert told == [
        f"Client `a` has no data in round {round} and sits it out; its adapters stay as they are." for round in (2, 3)
    ]
    assert idle.stream.idle_rounds == (2, 3)
    trained = [row.tolist() for row in seen["a"] if (row >= 0).all()]
    assert len(trained) == 4  # epochs of its own: four rounds
    assert set(trained[2]) & set(idle.stream.new_rows(4).tolist())
    assert (seen["b"] >= 0).all()
    assert all(torch.isfinite(value).all() for value in trainer.lightning_module.state_dict().values())


def test_a_client_without_any_data_sits_out_every_round(tmp_path, caplog):
    """As a scenario with "dummy" slots only makes it; the other client trains in all four rounds."""
    idle = stream_data(sizes=(0, 0))
    with caplog.at_level(logging.WARNING, logger="lightning_pfl.data"):
        seen, trainer = fit(tmp_path, {"a": idle, "b": stream_data()})

    told = [record.getMessage() for record in caplog.records if "sits it out" in record.getMessage()]
    assert [message.split(" in round ")[0] for message in told] == ["Client `a` has no data"] * 4
    assert trainer.current_epoch == 4
    assert (seen["a"] == -1).all()
    assert (seen["b"][:4] >= 0).all()


def test_an_idle_round_has_no_batches():
    data = stream_data(sizes=(8, 0))
    data.trainer = type("T", (), {"strategy": type("S", (), {"client_id": "a", "round": 3})()})()

    assert len(data.train_dataloader()) == 0
    assert list(data.train_dataloader()) == []


def test_a_client_that_misses_rounds_misses_what_they_bring(tmp_path):
    """Half of the clients take part in a round: rows of a missed round never come up."""
    seen, _ = fit(tmp_path, {"a": stream_data(), "b": stream_data()}, fraction=0.5, seed=1)
    stream = stream_data().stream

    took = {name: int((rows >= 0).all(dim=1).sum()) for name, rows in seen.items()}
    assert sum(took.values()) == 4
    for name in ("a", "b"):
        rows = set(seen[name][seen[name] >= 0].tolist())
        whole = [round for round in range(4) if rows & set(stream.new_rows(round).tolist())]
        assert len(whole) == took[name]


def test_an_ordinary_trainer_passes_over_rounds_without_data(tmp_path):
    """Without `reload_dataloaders_every_n_epochs`, too."""
    module, data = Recording(), stream_data(sizes=(0, 8, 8))
    trainer = L.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(tmp_path),
    )  # fmt: skip
    trainer.fit(module, data)

    for epoch, round in enumerate((2, 3, 4, 5)):
        assert set(module.rows[epoch].tolist()) & set(data.stream.new_rows(round).tolist())
    assert (module.rows[4:] == -1).all()


def test_epochs_beyond_the_stream_are_refused(tmp_path):
    data = stream_data()
    data.trainer = type("T", (), {"strategy": None, "current_epoch": 4})()
    with pytest.raises(ValueError, match="4 rounds with data, but this is epoch 4"):
        data.rows()


def test_asking_twice_in_a_round_draws_once():
    """Sanity checks, length and iteration all ask."""
    data = stream_data()
    loader = data.train_dataloader()

    assert len(loader) == 3
    assert [row.tolist() for batch in loader for row in batch[2]] == [
        row.tolist() for batch in loader for row in batch[2]
    ]
    assert data.memory.counts.sum() == pytest.approx(6, rel=0.05)


def test_a_memory_goes_through_a_weights_only_checkpoint(tmp_path):
    data = stream_data()
    data.rows()
    torch.save(data.state_dict(), tmp_path / "memory.pt")
    other = stream_data()
    other.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))

    assert torch.equal(other.memory.counts, data.memory.counts)
    assert torch.equal(other.memory.rows, data.memory.rows)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"stream counts, \(8, 4\), but have \(8, 8\)"):
        StreamDataModule([task(0, 8), task(8, 8)], DynamicStream([8, 4], 1), num_steps=1)
    with pytest.raises(ValueError, match="`num_steps` must be at least 1"):
        stream_data(num_steps=0)
    data = stream_data()
    data.trainer = type("T", (), {"strategy": type("S", (), {"local_steps": 5})()})()
    with pytest.raises(ValueError, match="`num_steps`=3 batches, but the strategy ends a turn after `local_steps`=5"):
        data.train_dataloader()


def test_validation_and_test_are_one_loader_or_several():
    data = stream_data(val=task(0, 3), test=[task(0, 2), task(2, 5)], eval_batch_size=4)

    assert len(data.val_dataloader().dataset) == 3
    assert [len(loader) for loader in data.test_dataloader()] == [1, 2]
    assert stream_data().val_dataloader() == []


def test_capacity_of_the_memory_is_kept_over_rounds(tmp_path):
    data = stream_data(replay=CountReplay(capacity=5))
    for epoch in range(4):
        data.trainer = type("T", (), {"strategy": None, "current_epoch": epoch})()
        data.rows()
    assert len(data.memory.rows) == 5
