"""`ClientData`: where a client's dataloaders come from."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import cloudpickle  # type: ignore[import-untyped, unused-ignore]
import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

__all__ = ["ClientData", "pack_datamodule"]


@dataclass(frozen=True, eq=False)
class ClientData:
    """What was handed to ``trainer.fit`` (or validate, test, predict), and datamodules that clients brought themselves.

    Attributes:
        datamodule: for clients without one of their own.
        loaders: dataloaders by stage: "train", "val", "test", "predict".
        own: by client id, from `pack_datamodule`: only the client whose turn it is unpickles it.
    """

    datamodule: L.LightningDataModule | None = None
    loaders: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Tensor] = field(default_factory=dict)

    def arguments(self, client_id: str, stage: TrainerFn) -> dict[str, Any]:
        """What to hand to ``trainer.fit``, ``validate``, ``test`` or ``predict``; empty: the module has its loaders."""
        if client_id in self.own:
            return {"datamodule": pickle.loads(self.own[client_id].numpy().data)}
        if self.datamodule is not None:
            return {"datamodule": self.datamodule}
        if stage is TrainerFn.FITTING:
            wanted = {"train_dataloaders": "train", "val_dataloaders": "val"}
        else:
            wanted = {"dataloaders": "val" if stage is TrainerFn.VALIDATING else stage.value}
        return {name: self.loaders[key] for name, key in wanted.items() if self.loaders.get(key) is not None}


def pack_datamodule(datamodule: L.LightningDataModule) -> Tensor:
    """Pickle a client's own datamodule into a tensor, which lies in the run's tensor file until its turn comes.

    Raises:
        TypeError: it cannot be pickled.
    """
    return torch.frombuffer(bytearray(cloudpickle.dumps(datamodule)), dtype=torch.uint8)
