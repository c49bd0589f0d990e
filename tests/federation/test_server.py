"""What the driver logs, monitors, saves and returns, under the user's own names."""

import csv
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, ModelSummary
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_pfl.aggregation import LocalOnly
from lightning_pfl.federation import Client
from lightning_pfl.federation.turn import unpack_state
from tests.federation.runs import strategy_of, trainer_of
from tests.federation.test_strategy import FixedSketch, colora
from tests.federation.tiny import Blocks, ClientsOwnData, Tiny, dataset


def value(tensor):
    return float(tensor)


def test_metrics_before_and_after_aggregation_have_their_names(tmp_path):
    """A mean over clients under the user's name, each client's under its own, and the same before aggregation."""
    trainer = trainer_of(tmp_path, strategy_of(["a", "b"]))

    trainer.fit(Tiny(), datamodule=ClientsOwnData())

    metrics = {name: value(tensor) for name, tensor in trainer.callback_metrics.items()}
    after = [metrics["client/a/val_loss"], metrics["client/b/val_loss"]]
    assert metrics["val_loss"] == pytest.approx(sum(after) / 2)
    assert metrics["val_loss_local"] != pytest.approx(metrics["val_loss"])
    assert math.isfinite(metrics["train_loss"])


def test_without_exchange_the_metric_is_the_same_before_and_after_aggregation(tmp_path):
    trainer = trainer_of(tmp_path, strategy_of(["a", "b"], aggregator=LocalOnly()))

    trainer.fit(Tiny(), datamodule=ClientsOwnData())

    assert value(trainer.callback_metrics["val_loss"]) == pytest.approx(
        value(trainer.callback_metrics["val_loss_local"])
    )


def test_every_other_round_is_evaluated_if_the_trainer_says_so(tmp_path):
    seen = []

    class Watch(L.Callback):
        federated_scope = "server"

        def on_validation_epoch_end(self, trainer, pl_module):
            seen.append(trainer.current_epoch)

    trainer = trainer_of(tmp_path, max_epochs=4, check_val_every_n_epoch=2, callbacks=[Watch()])

    trainer.fit(Tiny(), datamodule=ClientsOwnData())

    assert seen == [1, 3]


def test_without_validation_data_nothing_is_evaluated(tmp_path):
    trainer = trainer_of(tmp_path)

    trainer.fit(Tiny(), train_dataloaders=DataLoader(dataset(1), batch_size=4))

    assert "train_loss" in trainer.callback_metrics
    assert not [name for name in trainer.callback_metrics if "val_loss" in name]


def test_dataloaders_may_be_handed_to_fit(tmp_path):
    trainer = trainer_of(tmp_path)

    trainer.fit(Tiny(), DataLoader(dataset(1), batch_size=4), DataLoader(dataset(2), batch_size=4))

    assert "val_loss" in trainer.callback_metrics


def test_a_checkpoint_and_a_stopper_monitor_the_users_own_name(tmp_path):
    class Worsens(Tiny):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.trainer.strategy.round))

    best = ModelCheckpoint(tmp_path, monitor="val_loss", filename="{epoch}-{val_loss:.1f}")
    trainer = trainer_of(
        tmp_path, max_epochs=9, enable_checkpointing=True, callbacks=[best, EarlyStopping("val_loss", patience=2)]
    )

    trainer.fit(Worsens(), datamodule=ClientsOwnData())

    assert trainer.current_epoch == 3  # rounds 0, 1 and 2
    assert os.path.basename(best.best_model_path) == "epoch=0-val_loss=0.0.ckpt"


def test_a_client_may_stop_by_itself(tmp_path):
    """With the scope "client", a stopper ends one client's training; the others and the rounds go on."""

    class OneWorsens(Tiny):
        def validation_step(self, batch, batch_idx):
            sign = 1 if self.trainer.strategy.client_id == "a" else -1
            self.log("val_loss", sign * float(self.trainer.strategy.round))

    stopper = EarlyStopping("val_loss", patience=1)
    stopper.federated_scope = "client"
    strategy = strategy_of(["a", "b"])
    trainer = trainer_of(tmp_path, strategy, max_epochs=5, num_sanity_val_steps=0, callbacks=[stopper])

    trainer.fit(OneWorsens(), datamodule=ClientsOwnData())

    steps = {name: unpack_state(strategy.store.get(name))["global_step"] for name in "ab"}
    assert steps == {"a": 2 * 3, "b": 5 * 3}
    # the one that stopped still counts with all of its data: the mean of equal counts
    row = strategy.relevance[-1].weights[0]
    assert row[0] == row[1] == 0.5
    assert trainer.current_epoch == 5


def rows(logger):
    with open(os.path.join(logger.log_dir, "metrics.csv"), newline="") as file:
        return list(csv.DictReader(file))


def test_what_clients_log_appears_under_their_names_in_the_runs_own_loggers(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer = trainer_of(tmp_path, strategy_of(["a", "b"]), logger=logger, callbacks=[LearningRateMonitor("epoch")])

    trainer.fit(Tiny(), datamodule=ClientsOwnData())

    columns = {name for row in rows(logger) for name, entry in row.items() if entry}
    assert {"client/a/train_loss", "client/b/lr-AdamW", "client/a/val_loss", "client/a/val_loss_local"} <= columns
    assert {"train_loss", "val_loss", "val_loss_local"} <= columns
    # the user's own names appear once a round, at the round's step
    assert [row["step"] for row in rows(logger) if row["val_loss"]] == ["0", "1", "2"]


def test_a_logger_in_a_client_takes_every_call(tmp_path, caplog):
    class Paints(Tiny):
        def on_train_epoch_end(self):
            self.logger.experiment.add_image("picture", None)
            with open(os.path.join(self.trainer.log_dir, "note.txt"), "a") as file:
                file.write("x")

        def on_train_start(self):
            os.makedirs(self.trainer.log_dir, exist_ok=True)

    logger = CSVLogger(tmp_path)

    trainer_of(tmp_path, strategy_of(["a", "b"]), logger=logger).fit(Paints(), datamodule=ClientsOwnData())

    assert caplog.text.count("add_image") == 1
    assert (tmp_path / "lightning_logs/version_0/clients/a/note.txt").read_text() == "xxx"


def test_the_relevance_of_every_round_lies_beside_the_logs(tmp_path):
    logger = CSVLogger(tmp_path)
    strategy = strategy_of(["a", "b", "c"], share=())
    trainer = trainer_of(tmp_path, strategy, max_epochs=2, logger=logger, callbacks=[colora(), FixedSketch()])

    trainer.fit(Blocks(), datamodule=ClientsOwnData())

    lines = [json.loads(line) for line in Path(logger.log_dir, "relevance.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1]
    assert lines[-1]["client_ids"] == ["a", "b", "c"]
    torch.testing.assert_close(torch.tensor(lines[-1]["weights"]), strategy.relevance[-1].weights)
    # by hand: the pairs (a, b), (a, c), (b, c) have cosines 1, 0, 0
    assert value(trainer.callback_metrics["relevance/similarity"]) == pytest.approx(1 / 3)
    assert 0 < value(trainer.callback_metrics["relevance/evenness"]) < 1


def test_a_model_summary_describes_the_users_module(tmp_path, caplog):
    seen = []

    class Summary(ModelSummary):
        def on_fit_start(self, trainer, pl_module):
            seen.append(type(pl_module))

    trainer = trainer_of(tmp_path, callbacks=[Summary()], enable_model_summary=True)

    trainer.fit(Tiny(), datamodule=ClientsOwnData())

    assert seen == [Tiny]


def test_several_validation_loaders_keep_lightnings_names(tmp_path):
    class TwoLoaders(ClientsOwnData):
        def val_dataloader(self):
            return [super().val_dataloader(), super().val_dataloader()]

    class Two(Tiny):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            super().validation_step(batch, batch_idx)

    trainer = trainer_of(tmp_path, strategy_of(["a", "b"]))

    trainer.fit(Two(), datamodule=TwoLoaders())

    assert {
        "val_loss/dataloader_idx_0",
        "val_loss_local/dataloader_idx_1",
        "client/a/val_loss/dataloader_idx_1",
    } <= trainer.callback_metrics.keys()


def test_validate_test_and_predict_run_each_clients_model_on_its_own_data(tmp_path):
    strategy = strategy_of(["a", "b"])
    trainer, module, data = trainer_of(tmp_path, strategy), Tiny(), ClientsOwnData()
    trainer.fit(module, datamodule=data)
    after_fit = {name: value(tensor) for name, tensor in trainer.callback_metrics.items()}

    (validated,) = trainer.validate(module, datamodule=data, verbose=False)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    predicted = trainer.predict(module, datamodule=data)

    assert validated == {name: after_fit[name] for name in ("val_loss", "client/a/val_loss", "client/b/val_loss")}
    assert tested["client/a/test_loss"] == pytest.approx(validated["client/a/val_loss"])
    assert tested["test_loss"] == pytest.approx(validated["val_loss"])
    assert {name: [len(batch) for batch in batches] for name, batches in predicted.items()} == {
        "a": [4, 4, 4],
        "b": [4, 4, 4],
    }
    assert trainer.lightning_module is module


def test_a_run_is_evaluated_from_its_checkpoint_in_another_process(tmp_path):
    trainer = trainer_of(tmp_path, enable_checkpointing=True)
    trainer.fit(Tiny(), datamodule=ClientsOwnData())
    expected = trainer.validate(ckpt_path="best", datamodule=ClientsOwnData(), verbose=False)
    path = trainer.checkpoint_callback.best_model_path

    other = trainer_of(tmp_path / "other")
    got = other.validate(Tiny(), datamodule=ClientsOwnData(), ckpt_path=path, verbose=False)

    assert got == expected
    untrained = trainer_of(tmp_path / "new").validate(Tiny(), datamodule=ClientsOwnData(), verbose=False)
    assert untrained != expected
    assert torch.equal(
        other.strategy.personalize(Tiny(), "a").head.weight, trainer.strategy.personalize(Tiny(), "a").head.weight
    )


def test_a_client_knows_how_far_it_is_when_it_is_evaluated(tmp_path):
    class Tells(Tiny):
        def validation_step(self, batch, batch_idx):
            self.log("epochs", float(self.trainer.current_epoch))
            self.log("steps", float(self.trainer.global_step))

    trainer = trainer_of(tmp_path, max_epochs=2)

    trainer.fit(Tells(), datamodule=ClientsOwnData())

    assert value(trainer.callback_metrics["epochs_local"]) == 1  # inside the second epoch, as in any fit
    assert value(trainer.callback_metrics["epochs"]) == 2  # after it, as in any validate after a fit
    assert value(trainer.callback_metrics["steps"]) == 6


def test_fast_dev_run_is_one_round_of_one_batch(tmp_path):
    strategy = strategy_of(["a", "b"])

    trainer_of(tmp_path, strategy, max_epochs=None, fast_dev_run=True).fit(Tiny(), datamodule=ClientsOwnData())

    assert unpack_state(strategy.store.get("a"))["global_step"] == 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision_is_the_clients(tmp_path, precision):
    strategy = strategy_of(["a", "b"])
    module = Tiny()

    trainer_of(tmp_path, strategy, precision=precision).fit(module, datamodule=ClientsOwnData())

    kept = unpack_state(strategy.store.get("a"))["state_dict"]["encoder.weight"].dtype
    assert kept == {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert module.encoder.weight.dtype == torch.float32


INTERRUPTED = """
    import os, signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
    import lightning as L
    from lightning_pfl.federation import Client, FederatedStrategy, LocalPool, StackedPool
    from lightning.pytorch.callbacks import OnExceptionCheckpoint
    sys.path.insert(0, {root!r})
    from tests.federation.tiny import ClientsOwnData, Tiny

    class Stops(Tiny):
        def training_step(self, batch, batch_idx):
            if self.trainer.strategy.client_id == "b" and self.current_epoch == 1:
                os.kill(os.getpid(), signal.{signal})
            return super().training_step(batch, batch_idx)

    class Tell(L.Callback):
        federated_scope = "server"
        def on_exception(self, trainer, pl_module, exception):
            print("TOLD", type(exception).__name__, trainer.state.status, type(pl_module).__name__, flush=True)

    strategy = FederatedStrategy([Client("a"), Client("b")], pool={pool}(), share=["encoder"])
    trainer = L.Trainer(max_epochs=3, strategy=strategy, logger=False, accelerator="cpu", enable_progress_bar=False,
                        callbacks=[OnExceptionCheckpoint({folder!r}, "stopped"), Tell()], default_root_dir={folder!r})
    module = Stops()
    try:
        trainer.fit(module, datamodule=ClientsOwnData())
    finally:
        print("LEFT", trainer.lightning_module is module, strategy.store.ids(), flush=True)
"""


@pytest.mark.parametrize("pool", ["LocalPool", "StackedPool"])
@pytest.mark.parametrize(("name", "exception"), [("SIGINT", "KeyboardInterrupt"), ("SIGTERM", "SIGTERMException")])
def test_a_signal_ends_the_run_as_lightning_does_and_saves_the_last_whole_round(tmp_path, name, exception, pool):
    script = tmp_path / "script.py"
    filled = textwrap.dedent(INTERRUPTED).format(root=os.getcwd(), folder=str(tmp_path), signal=name, pool=pool)
    script.write_text(filled)

    ended = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert f"TOLD {exception} TrainerStatus.INTERRUPTED ServerModule" in ended.stdout, ended.stdout + ended.stderr
    assert "LEFT True ['a', 'b']" in ended.stdout
    assert ended.returncode == (1 if name == "SIGINT" else 0)  # Lightning's own
    saved = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    states = saved["federated"]["store"]["states"]
    assert {n: unpack_state(s.numpy().tobytes())["epoch"] for n, s in states.items()} == {"a": 1, "b": 1}


def test_client_turns_leave_no_worker_processes(tmp_path):
    import multiprocessing

    trainer = trainer_of(tmp_path, strategy_of(["a", "b"]), max_epochs=2)

    trainer.fit(Tiny(), datamodule=ClientsOwnData(num_workers=1))

    assert multiprocessing.active_children() == []


def test_clients_may_ask_for_threads_of_their_own(tmp_path):
    class Threads(Tiny):
        def training_step(self, batch, batch_idx):
            self.log("threads", float(torch.get_num_threads()), on_epoch=True)
            return super().training_step(batch, batch_idx)

    strategy = strategy_of([Client("a"), Client("b", num_threads=2)])
    before = torch.get_num_threads()
    trainer = trainer_of(tmp_path, strategy, max_epochs=1)

    trainer.fit(Threads(), datamodule=ClientsOwnData())

    assert value(trainer.callback_metrics["threads_epoch"]) == 1.5
    assert torch.get_num_threads() == before
