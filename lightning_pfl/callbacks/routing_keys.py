"""`RoutingKeys`: while a client trains, remember what its questions look like, so that others' can be sent to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_pfl.callbacks.federated import KeySource
from lightning_pfl.functional.routing import Keys
from lightning_pfl.relevance.base import Reader
from lightning_pfl.relevance.sketches import CountSketch

__all__ = ["RoutingKeys"]

_FINER = 4  # groups that a client keeps for each that it sends, so that what comes later can still be told apart
_PENDING = 256  # questions that are kept one by one before they are put into groups


@final
class RoutingKeys(KeySource):
    """Tells the server what questions a client has trained on, in a few groups, without their answers or labels.

    With these keys ``strategy.experts(module, client_id)`` answers each question with the adapter of the client that
    trained on such questions. What is sent is, per group, a number of questions, and mean and spread of what the frozen
    reader says of them: 1 kB a group. Everybody's keys and adapters go to every client that is to answer so; see the
    guide on what that tells others.

    A client does not know where one of its tasks ends and another begins: whatever it trains on is put into
    ``num_keys`` groups by likeness. The client's own model, its random numbers and its gradients are left alone.

    Args:
        reader: the frozen model that tells questions apart, the same for all clients; a `CausalLMProbe` that sketches
            tasks can be the very same object.
        to_reader: turns a training batch, and a batch of questions, into what the reader takes. None: it takes them as
            they are.
        every_n_steps: optimizer steps from one batch that is read to the next, >= 1.
        num_keys: groups that are sent at most; more than a client has tasks.
        size: k, numbers that each question is projected to; what a reader says in fewer is taken as it is.
        seed: of the projection; the same for all clients.

    Raises:
        ValueError: a number below 1.

    Example:
        >>> class Words(Reader):
        ...     def prepare(self): pass
        ...     def read(self, batch): return batch["x"]
        >>> callback = RoutingKeys(Words(), num_keys=2)
        >>> callback.take_keys() is None  # nothing was read yet
        True
        >>> callback.read({"x": torch.ones(1, 3)})
        tensor([[1., 1., 1.]])
    """

    def __init__(
        self,
        reader: Reader,
        *,
        to_reader: Callable[[Any], Any] | None = None,
        every_n_steps: int = 1,
        num_keys: int = 8,
        size: int = 128,
        seed: int = 0,
    ) -> None:
        for name, number in (("every_n_steps", every_n_steps), ("num_keys", num_keys), ("size", size)):
            if number < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {number}.")
        self.reader = reader
        self.to_reader = to_reader
        self.every_n_steps = every_n_steps
        self.num_keys = num_keys
        self._project = CountSketch(size, seed=seed)
        self._keys: Keys | None = None
        self._pending: list[Tensor] = []
        self._last_step: int | None = None

    def prepare_server(self, module: L.LightningModule, *, global_branch: bool) -> None:
        """Load the reader's model once, on the driver; clients receive it with their snapshot."""
        self.reader.prepare()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start anew with every fit; what a checkpoint carries over is restored after this."""
        if stage == "fit":
            self.load_state_dict({"keys": None, "pending": None, "last_step": None})

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Read this step's first batch if its turn has come."""
        step = trainer.global_step
        if self._last_step is not None and step < self._last_step + self.every_n_steps:
            return
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
            self._pending.append(self.read(batch))
        self._last_step = step
        if sum(map(len, self._pending)) >= _PENDING:
            self._gather()

    def read(self, batch: Any) -> Tensor:
        """What a batch's questions look like, float32 ``[n, k]``."""
        rows = self.reader.read(batch if self.to_reader is None else self.to_reader(batch)).float().cpu()
        if rows.shape[1] <= self._project.size:
            return rows
        return torch.stack([self._project(row) for row in rows])

    def take_keys(self) -> Tensor | None:
        """The keys of all questions since training began; None when nothing was read."""
        self._gather()
        return None if self._keys is None else self._keys.merged(self.num_keys).rows

    def state_dict(self) -> dict[str, Any]:
        """Keys so far, and what is not yet among them."""
        return {
            "keys": None if self._keys is None else self._keys.rows,
            "pending": torch.cat(self._pending) if self._pending else None,
            "last_step": self._last_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self._keys = None if state_dict["keys"] is None else Keys(state_dict["keys"])
        self._pending = [] if state_dict["pending"] is None else [state_dict["pending"]]
        self._last_step = state_dict["last_step"]

    def _gather(self) -> None:
        questions = torch.cat(self._pending) if self._pending else torch.zeros(0, 1)
        self._pending = []
        if len(questions):
            limit = _FINER * self.num_keys
            new = Keys.of(questions, limit=limit)
            self._keys = new if self._keys is None else (self._keys + new).merged(limit)
