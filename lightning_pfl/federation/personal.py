"""One client's model after a run: as a module, or as a folder that others can load."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from lightning_pfl.federation.rounds import Rounds
from lightning_pfl.federation.turn import build_client

__all__ = ["personalize"]


def personalize(rounds: Rounds, client_id: str, module: L.LightningModule) -> L.LightningModule:
    """See `FederatedStrategy.personalize`."""
    plan = rounds.plan
    job = rounds.job(client_id, TrainerFn.FITTING, rounds.round or 0)
    _, personal = build_client(plan.snapshots[job.snapshot], job)
    return personal.eval()


def export(rounds: Rounds, client_id: str, path: Path) -> Path:
    """See `FederatedStrategy.export`."""
    raise NotImplementedError
