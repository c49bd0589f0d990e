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
from lightning_pfl.callbacks.own_order import in_own_order
from lightning_pfl.functional.mechanisms import SketchBound, SketchNoise
from lightning_pfl.functional.privacy import clip_rows
from lightning_pfl.relevance.base import ExampleProbe, Probe

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

    Where single examples are hidden by noise (``FederatedStrategy(privacy=...)``), the batches come from the training
    data in an order that the training has no part in, every example goes through ``to_probe`` and the probe by itself,
    as a batch of one, and counts the same, and its sketch is bounded by the probe's ``max_norm``.

    Args:
        probe: the frozen model and its gradient, the same for all clients.
        to_probe: turns a training batch into a probe batch.
        every_n_steps: optimizer steps from one sketch to the next, >= 1; the paper's 10.

    Raises:
        ValueError: ``every_n_steps`` below 1; in training, a ``probe_dataloader()`` that yields nothing. Where single
            examples are hidden, also a probe that cannot bound them, and data whose order cannot be known (an iterable
            data set, a sampler of one's own).

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
        self._bounds_examples = False
        self._bound: SketchBound | None = None
        self._total: Tensor | None = None
        self._count = 0
        self._passes: set[int] = set()
        self._last_step: int | None = None
        self._drawn = 0
        self._batches: Iterator[tuple[int, Any]] | None = None

    def prepare_server(self, module: L.LightningModule, *, global_branch: bool) -> None:
        """Load the probe's model once, on the driver; clients receive it with their snapshot."""
        self.probe.prepare()

    def prepare_noise(self, noise: SketchNoise | None) -> None:
        """Check that the probe can bound what the noise hides. See `SketchSource.prepare_noise`."""
        self._bounds_examples = noise is not None and noise.bounds_examples
        if not self._bounds_examples:
            return
        if not isinstance(self.probe, ExampleProbe):
            raise ValueError(
                f"`{type(noise).__name__}` hides single examples, but a {type(self.probe).__name__} does not tell them "
                "apart: it is no `ExampleProbe`. Use one (`CausalLMProbe`, `GradientProbe`), or hide whole clients by "
                "`ClientNoise`."
            )
        if self.probe.max_norm is None:
            raise ValueError(
                f"`{type(noise).__name__}` needs a bound on what one example adds to a sketch, but the probe has none. "
                f"Write `{type(self.probe).__name__}(..., max_norm=C)`, with C no more than the length that most "
                "sketches of public examples have: relevance does not read lengths, and noise grows with C."
            )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start anew with every fit; what a checkpoint carries over is restored after this."""
        if stage == "fit":
            self.load_state_dict({"total": None, "count": 0, "passes": [], "last_step": None, "drawn": 0})

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sketch this step's first batch if its turn has come."""
        step = trainer.global_step
        if self._last_step is not None and step < self._last_step + self.every_n_steps:
            return
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
            if self._bounds_examples:
                sketch, count = self._sum_of_bounded(trainer)
            else:
                sketch, count = self.probe.sketch(self._probe_batch(trainer, batch)), 1
        self._total = sketch if self._total is None else self._total + sketch
        self._count += count
        self._last_step = step

    def take_sketch(self) -> Tensor | None:
        """The mean sketch since the last call, ``[k]``, and start anew; None when nothing was sketched."""
        if self._total is None:
            return None
        mean = self._total / self._count
        if self._bounds_examples:
            assert isinstance(self.probe, ExampleProbe)
            assert self.probe.max_norm is not None
            self._bound = SketchBound(self.probe.max_norm, self._count, len(self._passes))
        self._total, self._count, self._passes = None, 0, set()
        return mean

    def take_bound(self) -> SketchBound | None:
        """Of the sketch that was taken last; None unless single examples are hidden."""
        return self._bound

    def state_dict(self) -> dict[str, Any]:
        """What a turn that is cut in two must carry over: the sum so far and where the next sketch is due."""
        return {
            "total": self._total,
            "count": self._count,
            "passes": sorted(self._passes),
            "last_step": self._last_step,
            "drawn": self._drawn,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self._total, self._count = state_dict["total"], state_dict["count"]
        self._passes = set(state_dict["passes"])
        self._last_step, self._drawn = state_dict["last_step"], state_dict["drawn"]
        self._bound, self._batches = None, None

    def __getstate__(self) -> dict[str, Any]:
        """A copy opens its loader anew, at the batch that is due."""
        return {**self.__dict__, "_batches": None}

    def _probe_batch(self, trainer: L.Trainer, batch: Any) -> Any:
        if self.to_probe is not None:
            return self.to_probe(batch)
        make_loader = _probe_loader_of(trainer)
        return batch if make_loader is None else self._next(make_loader)[1]

    def _sum_of_bounded(self, trainer: L.Trainer) -> tuple[Tensor, int]:
        """The sum of a batch's bounded sketches, float64 ``[k]``, and of how many examples.

        Every example goes through `to_probe` and the probe by itself: in a padded batch, another one's length can move
        its positions, and with them its gradient.
        """
        assert isinstance(self.probe, ExampleProbe)
        assert self.probe.max_norm is not None
        make_loader = _probe_loader_of(trainer) if self.to_probe is None else None
        number, examples = self._next(
            lambda: in_own_order(trainer.train_dataloader if make_loader is None else make_loader())
        )
        self._passes.add(number)
        total = torch.zeros(self.probe.size, dtype=torch.float64)
        for example in examples:
            rows = self.probe.sketches(example if self.to_probe is None else self.to_probe(example))
            if len(rows):  # several views of one example count as their mean
                total += clip_rows(rows.double().mean(dim=0, keepdim=True), self.probe.max_norm)[0]
        return total, len(examples)

    def _next(self, make_loader: Callable[[], Any]) -> tuple[int, Any]:
        """In which pass we are, and its batch that is due."""
        if self._batches is None:
            self._batches = self._open(make_loader)
        due = next(self._batches)
        self._drawn += 1
        return due

    def _open(self, make_loader: Callable[[], Any]) -> Iterator[tuple[int, Any]]:
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
                    yield passes, batch
            if not length:
                raise ValueError(
                    "The datamodule's `probe_dataloader()` must yield at least one batch, but yields none."
                )
            passes += 1


_END = object()


def _probe_loader_of(trainer: L.Trainer) -> Callable[[], Any] | None:
    found: Callable[[], Any] | None = getattr(getattr(trainer, "datamodule", None), "probe_dataloader", None)
    return found


def _seed(seed: int) -> None:
    """Set every generator that a dataset's transforms may read."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
