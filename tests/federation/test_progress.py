"""While a round runs, Lightning's own bars say how many clients are done."""

import io
import logging
import re

import lightning as L
import pytest
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_pfl.federation import LocalPool
from lightning_pfl.federation.progress import Progress
from tests.federation.runs import strategy_of, trainer_of
from tests.federation.tiny import ClientsOwnData, Tiny

pytestmark = pytest.mark.usefixtures("told")


def shown(text):
    """Which stage's bar showed which counts, in order, each once."""
    found = re.findall(r"(Epoch \d|Validation|Testing|Predicting)[^\r\n]*?clients (\d/\d)", text)
    return list(dict.fromkeys(found))


def all_stages(tmp_path, bar):
    trainer = trainer_of(
        tmp_path, strategy_of(["a", "b"]), max_epochs=2, enable_progress_bar=True, callbacks=[bar]
    )  # fmt: skip
    module, data = Tiny(), ClientsOwnData()
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    trainer.predict(module, datamodule=data)


EXPECTED = [
    (stage, f"{done}/2")
    for stage in ("Epoch 0", "Validation", "Epoch 1", "Testing", "Predicting")
    for done in range(3)
]  # fmt: skip


def test_a_plain_bar_counts_clients(tmp_path, capsys):
    all_stages(tmp_path, TQDMProgressBar())

    captured = capsys.readouterr()
    assert shown(captured.out + captured.err) == EXPECTED


def test_a_bar_says_bytes_and_the_time_that_is_left(tmp_path, capsys):
    """The encoder's 40 numbers of four bytes go up, two clients, and come down to be evaluated."""
    all_stages(tmp_path, TQDMProgressBar())

    captured = capsys.readouterr()
    told = re.findall(r"clients (\d/\d), (\d+ B) up, (\d+ B) down(, [\d.]+ \w+ left)?", captured.out + captured.err)
    assert {(done, up, down) for done, up, down, _ in told} >= {
        ("0/2", "0 B", "0 B"),
        ("1/2", "320 B", "320 B"),  # evaluated after the first round
        ("2/2", "640 B", "640 B"),
    }
    assert not told[0][3]  # nothing is known before anybody has delivered
    assert any(left for *_, left in told)


def progress_of(epoch, clock, **arguments):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, **arguments)
    trainer.state.fn, trainer.state.stage = TrainerFn.FITTING, RunningStage.TRAINING
    progress = Progress(trainer, LocalPool(), lambda: (0, 0), clock=lambda: clock[0])

    def begin(epoch):
        trainer.fit_loop.epoch_progress.current.completed = epoch
        progress(0, 4)

    begin(epoch)
    return progress, begin


def test_the_time_left_is_that_of_the_rounds_so_far(caplog):
    """By hand: five rounds, the first takes 100 seconds, of the second 30 are over."""
    caplog.set_level(logging.INFO)
    clock = [1000.0]
    progress, begin = progress_of(0, clock, max_epochs=5)
    clock[0] += 25
    assert progress.seconds_left(0, 4) is None
    assert progress.seconds_left(1, 4) == 75 + 4 * 100
    clock[0] += 75
    begin(1)
    assert "The first round took 2 min; 4 more will take about 7 min." in caplog.text
    clock[0] += 30

    assert progress.seconds_left(0, 4) == 70 + 3 * 100
    clock[0] += 100
    assert progress.seconds_left(3, 4) == 3 * 100  # late, and nobody knows how late


def test_without_a_last_round_no_time_is_left():
    progress, _ = progress_of(0, [0.0], max_epochs=-1)
    assert progress.seconds_left(3, 4) is None


class Talks(Tiny):
    def on_train_start(self):
        rank_zero_info("a line of a client's Trainer")


def test_clients_trainers_show_nothing(tmp_path, capsys, caplog):
    """The driver's own lines come once; clients' Trainers have no bars, no summaries and no lines."""
    caplog.set_level(logging.INFO)
    trainer = trainer_of(
        tmp_path,
        strategy_of(["a", "b"]),
        enable_progress_bar=True,
        enable_model_summary=True,
        callbacks=[TQDMProgressBar()],
    )

    trainer.fit(Talks(), datamodule=ClientsOwnData())

    captured = capsys.readouterr()
    text = captured.out + captured.err + caplog.text
    assert "clients 2/2" in text
    assert caplog.text.count("GPU available") == 1
    assert "a line of a client" not in text
    assert not re.search(r"\d/3 \[", text)  # three batches: a client's bar would count them


def test_a_rich_bar_counts_clients(tmp_path):
    pytest.importorskip("rich")
    file = io.StringIO()

    all_stages(tmp_path, RichProgressBar(console_kwargs={"file": file, "force_terminal": True, "width": 200}))

    assert shown(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())) == EXPECTED


@pytest.mark.parametrize("bar", [ProgressBar, lambda: TQDMProgressBar(refresh_rate=0)], ids=["of one's own", "off"])
def test_other_bars_are_left_alone(tmp_path, bar, capsys):
    all_stages(tmp_path, bar())

    captured = capsys.readouterr()
    assert "clients" not in captured.out + captured.err
