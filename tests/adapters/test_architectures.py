"""The table of families in the documentation: its script works, fails when a promise breaks, and the page is complete.

The whole table is made and compared by ``make architectures``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.architectures import ROWS, STEPS, check
from lightning_pfl.adapters import CoLoraLayer

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"


@pytest.mark.parametrize("name", ["Whisper", "ConvNeXt"])
def test_a_family_passes_every_step(name, tmp_path):
    result = check(next(row for row in ROWS if row.name == name), tmp_path)

    assert list(result.cells) == list(STEPS)
    assert all(cell.startswith(("yes", "none")) for cell in result.cells.values()), result.cells
    assert str(result) in PAGE.read_text()


def test_a_broken_promise_shows_in_the_table(tmp_path, monkeypatch):
    """An adapter whose bias is lost in merging."""
    merged = CoLoraLayer.delta_weight
    monkeypatch.setattr(
        CoLoraLayer, "delta_weight", lambda self, name: (merged(self, name)[0], torch.zeros(self.out_features))
    )

    result = check(next(row for row in ROWS if row.name == "MLP"), tmp_path)

    assert result.cells["load"] == "yes"
    assert result.cells["merge"].startswith("**no**: AssertionError")
    assert "not reached" in str(result)


def test_the_page_says_yes_to_every_family():
    text = PAGE.read_text()

    assert [row.name for row in ROWS if f"| {row.name} |" not in text] == []
    assert "**no**" not in text
    assert "not reached" not in text
