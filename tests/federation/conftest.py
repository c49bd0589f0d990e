"""What several tests of the federation need."""

import logging

import pytest


@pytest.fixture
def told(caplog, monkeypatch):
    """Other tests of the process may have quietened Lightning, or imported its other package, which then speaks."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        for part in (name, f"{name}.utilities", f"{name}.utilities.rank_zero"):
            logger = logging.getLogger(part)
            monkeypatch.setattr(logger, "propagate", True)
            caplog.set_level(logging.INFO, logger=part)
