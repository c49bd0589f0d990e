"""While a round runs, Lightning's own bars say how many clients are done."""

import io
import re

import pytest
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from tests.federation.runs import strategy_of, trainer_of
from tests.federation.tiny import ClientsOwnData, Tiny


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
