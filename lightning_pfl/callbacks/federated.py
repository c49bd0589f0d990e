"""What a callback can do for a federation: exchange tensors, tell what a task looks like, or what questions do.

Start at `Exchange`. The engine knows callbacks only through these interfaces; without the engine they are ordinary
Lightning callbacks.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning as L
from torch import Tensor
from typing_extensions import override

from lightning_pfl.functional.mechanisms import SketchBound, SketchNoise
from lightning_pfl.types import Personalized, SharedTensors

__all__ = ["AdapterUser", "Exchange", "FederatedCallback", "KeySource", "SketchSource"]


class FederatedCallback(L.Callback):
    """A callback that a federation tells about itself before clients receive their copy of it."""

    def prepare_server(self, module: L.LightningModule, *, global_branch: bool) -> None:
        """Get ready on the driver, once per distinct model, before the snapshot that clients are made from.

        Args:
            module: a client's model with its layers built; changed in place (adapters are injected here).
            global_branch: whether the server will send a frozen global adapter (`Aggregator.uses_global_branch`).
        """


class AdapterUser(FederatedCallback):
    """A callback that changes the adapters which `CoLoRA` makes; it stands after `CoLoRA` among the callbacks."""

    @abstractmethod
    def adapters_ready(self, module: L.LightningModule) -> None:
        """Change a module's adapters, in place, before they are restored and trained; a second time does nothing."""

    @override
    def prepare_server(self, module: L.LightningModule, *, global_branch: bool) -> None:
        """Change them on the driver, too, where `CoLoRA` has made them by now."""
        self.adapters_ready(module)


class Exchange(FederatedCallback):
    """A callback that owns tensors which clients share.

    Attributes:
        prefix: how the names of everything that it shares begin; None: only what it uploads tells its names.
    """

    prefix: str | None = None

    @abstractmethod
    def architecture(self, module: L.LightningModule) -> str:
        """Equal for modules whose architecture-bound tensors may be mixed."""

    @abstractmethod
    def upload(self, module: L.LightningModule) -> SharedTensors:
        """Copy what the client trained and may share."""

    @abstractmethod
    def receive(self, module: L.LightningModule, personalized: Personalized) -> None:
        """Write what the server sent into the module, in place.

        Raises:
            ValueError: a name or a shape that the module does not have.
        """


class SketchSource(FederatedCallback):
    """A callback that sketches a client's task while it trains.

    It sketches in ``on_train_batch_start``, going by ``trainer.global_step``: a newcomer's data is shown to it there,
    while nothing is trained.
    """

    @abstractmethod
    def take_sketch(self) -> Tensor | None:
        """The mean sketch since the last call, ``[k]``, and start anew; None when nothing was sketched."""

    def prepare_noise(self, noise: SketchNoise | None) -> None:
        """Get ready on the driver for sketches that will be noised before they are sent; None: they will not be.

        Raises:
            ValueError: the noise hides single examples, and this source cannot bound what one of them adds.
        """
        if noise is not None and noise.bounds_examples:
            raise ValueError(
                f"`{type(noise).__name__}` hides single examples, but {type(self).__name__} does not say how far one "
                "moves its sketch. Use `RelevanceProbe`, or hide whole clients by `ClientNoise`."
            )

    def take_bound(self) -> SketchBound | None:
        """What bounds the examples of the sketch that was taken last; None: nothing does."""
        return None


class KeySource(FederatedCallback):
    """A callback that gathers what a client's questions look like, so that others can tell which ones it knows."""

    @abstractmethod
    def take_keys(self) -> Tensor | None:
        """The keys of all questions so far, ``[m, 1 + 2 k]`` (`Keys.rows`); None before the first."""

    @abstractmethod
    def read(self, batch: Any) -> Tensor:
        """What a batch's questions look like, ``[n, k]``, in the coordinates of the keys; answers are not looked at.

        Args:
            batch: as a client meets it in training, or in the same form without answers.
        """
