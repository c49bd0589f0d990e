"""`RelevanceProbe`: while a client trains, sketch every few steps what its task looks like to a small frozen model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, final

import lightning as L
import numpy
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_pfl.callbacks.federated import SketchSource
from lightning_pfl.relevance.base import Probe

__all__ = ["RelevanceProbe"]


@final
class RelevanceProbe(SketchSource):
    """Tells the server what a client's task is like, so that related clients can be found.

    At every ``every_n_steps``-th optimizer step, from the first on, one batch is sketched by the probe; what goes to
    the server is the mean of a turn's sketches. The client's own model, its random numbers and its gradients are left
    alone: a run with a probe trains to the same bits as one without.

    The batch is the training batch, turned by ``to_probe`` into the form that the probe's model takes (another
    tokenizer, another image size). Without ``to_probe``, a datamodule that has a ``probe_dataloader()`` supplies
    batches in that form; one without it, the training batch as it is.

    Args:
        probe: the frozen model and its gradient, the same for all clients.
        to_probe: turns a training batch into a probe batch.
        every_n_steps: optimizer steps from one sketch to the next, >= 1; the paper's 10.

    Raises:
        ValueError: ``every_n_steps`` below 1; in training, a ``probe_dataloader()`` that yields nothing.

    Example:
        >>> from torch import nn
        >>> from lightning_pfl.relevance import GradientProbe
        >>> def loss(module, batch):
        ...     return nn.functional.mse_loss(module(batch[0]), batch[1])
        >>> callback = RelevanceProbe(GradientProbe(nn.Linear(2, 1), loss, parameters=["weight"], size=8))
        >>> callback.take_sketch() is None  # nothing was sketched yet
        True
    """

    def __init__(self, probe: Probe, *, to_probe: Callable[[Any], Any] | None = None, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be at least 1, but is {every_n_steps}.")
        self.probe = probe
        self.to_probe = to_probe
        self.every_n_steps = every_n_steps
        self._total: Tensor | None = None
        self._count = 0
        self._last_step: int | None = None
        self._drawn = 0
        self._batches: Iterator[Any] | None = None

    def prepare_server(self, module: L.LightningModule, *, global_branch: bool) -> None:
        """Load the probe's model once, on the driver; clients receive it with their snapshot."""
        self.probe.prepare()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start anew with every fit; what a checkpoint carries over is restored after this."""
        if stage == "fit":
            self.load_state_dict({"total": None, "count": 0, "last_step": None, "drawn": 0})

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sketch this step's first batch if its turn has come."""
        step = trainer.global_step
        if self._last_step is not None and step < self._last_step + self.every_n_steps:
            return
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
            sketch = self.probe.sketch(self._probe_batch(trainer, batch))
        self._total = sketch if self._total is None else self._total + sketch
        self._count += 1
        self._last_step = step

    def take_sketch(self) -> Tensor | None:
        """The mean sketch since the last call, float32 ``[k]``, and start anew; None when nothing was sketched."""
        if self._total is None:
            return None
        mean = self._total / self._count
        self._total, self._count = None, 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        """What a turn that is cut in two must carry over: the sum so far and where the next sketch is due."""
        return {"total": self._total, "count": self._count, "last_step": self._last_step, "drawn": self._drawn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self._total, self._count = state_dict["total"], state_dict["count"]
        self._last_step, self._drawn = state_dict["last_step"], state_dict["drawn"]
        self._batches = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy opens its loader anew, at the batch that is due."""
        return {**self.__dict__, "_batches": None}

    def _probe_batch(self, trainer: L.Trainer, batch: Any) -> Any:
        if self.to_probe is not None:
            return self.to_probe(batch)
        make_loader = getattr(getattr(trainer, "datamodule", None), "probe_dataloader", None)
        if make_loader is None:
            return batch
        if self._batches is None:
            self._batches = self._open(make_loader)
        due = next(self._batches)
        self._drawn += 1
        return due

    def _open(self, make_loader: Callable[[], Any]) -> Iterator[Any]:
        """Batches without end, pass after pass, from the one that is due.

        Every batch is drawn from random numbers of its own, inside the caller's `isolate_rng`, so that a copy that
        opens the loader later meets the same batches.
        """
        to_skip, passes = self._drawn, 0
        while True:
            batches, length = None, 0
            while True:
                _seed(1_000_003 * passes + length)
                batches = iter(make_loader()) if batches is None else batches
                if (batch := next(batches, _END)) is _END:
                    break
                length += 1
                if to_skip:
                    to_skip -= 1
                else:
                    yield batch
            if not length:
                raise ValueError(
                    "The datamodule's `probe_dataloader()` must yield at least one batch, but yields none."
                )
            passes += 1


_END = object()


def _seed(seed: int) -> None:
    """Set every generator that a dataset's transforms may read."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
