"""What a small frozen model says of a client's data: a `Probe` sketches the task, a `Reader` reads single questions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

__all__ = ["ExampleProbe", "Probe", "Reader"]


class Probe(ABC):
    """A small frozen model whose gradient says what a task is like; the same for all clients."""

    @property
    @abstractmethod
    def size(self) -> int:
        """k, the length of a sketch."""

    @abstractmethod
    def prepare(self) -> None:
        """Load whatever is loaded lazily; called once on the driver, before clients receive their copy."""

    @abstractmethod
    def sketch(self, batch: Any) -> Tensor:
        """Sketch one batch.

        Args:
            batch: in the form that the frozen model takes.

        Returns:
            float32 of shape ``[k]``: the mean over the batch's examples of each one's projected (and, where privacy
            asks for it, clipped) gradient.
        """


class ExampleProbe(Probe):
    """A probe that knows what each example adds, and can bound it: what example-level privacy needs."""

    @property
    @abstractmethod
    def max_norm(self) -> float | None:
        """C: no example's sketch is longer. None: nothing bounds them."""

    @abstractmethod
    def sketches(self, batch: Any) -> Tensor:
        """Sketch every example of a batch.

        Args:
            batch: as for `sketch`.

        Returns:
            float32 of shape ``[n, k]``, one row per example of the batch, none longer than `max_norm`. An example with
            nothing to say (without an answer) has a row of zeros, so that n does not depend on what examples hold.
        """


class Reader(ABC):
    """A small frozen model that tells questions apart without knowing their answers; the same for all clients."""

    @abstractmethod
    def prepare(self) -> None:
        """Load whatever is loaded lazily; called once on the driver, before clients receive their copy."""

    @abstractmethod
    def read(self, batch: Any) -> Tensor:
        """What each question of a batch looks like.

        Args:
            batch: in the form that the frozen model takes. If it holds answers, nothing of them may be told.

        Returns:
            float32 of shape ``[n, d]`` on the CPU, one row per question; a row does not depend on the others.
        """
