r"""How much noise what a client sends needs: whom it hides, how far that one can move it, and the noise.

Start at `ExampleNoise`. A mechanism is a frozen dataclass of settings; `noised_sketch` and `noised_update` are the two
releases there are. In all of them the noise is Gaussian with a standard deviation of `multiplier` times the sensitivity,
and two data sets are neighbours when one unit (an example, or all that a client has) is replaced by another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_pfl.functional.privacy import clip_rows, gaussian_noise, noise_context
from lightning_pfl.types import FlatTensors, SharedTensors

__all__ = [
    "ClientNoise",
    "ExampleNoise",
    "NoiseStream",
    "SketchBound",
    "SketchNoise",
    "UpdateNoise",
    "noised_sketch",
    "noised_update",
]


@dataclass(frozen=True)
class SketchBound:
    """What bounds one example's part in a sketch, which is a mean over examples.

    Attributes:
        max_norm: C, no example's own sketch is longer.
        num_examples: n, over how many the mean is, > 0.
        passes: how often one example can be among them: once per pass over the data.
    """

    max_norm: float
    num_examples: int
    passes: int = 1


@dataclass(frozen=True)
class NoiseStream:
    """Where the noise of one turn comes from.

    Attributes:
        key: secret; see `gaussian_noise`.
        client_id: whose turn.
        round: which.
    """

    key: bytes
    client_id: str
    round: int

    def draw(self, purpose: str, value: Tensor) -> Tensor:
        """Standard normal numbers to hide a value, float64 in its shape."""
        context = noise_context(purpose, self.client_id, self.round, value)
        return gaussian_noise(value.numel(), key=self.key, context=context).reshape(value.shape)


class SketchNoise(ABC):
    """Whom the noise on a sketch hides. Leaves are frozen dataclasses.

    Attributes:
        multiplier: standard deviation of the noise over the sensitivity.
    """

    multiplier: float

    @property
    @abstractmethod
    def unit(self) -> str:
        """In words."""

    @abstractmethod
    def sensitivity(self, bound: SketchBound) -> float:
        """How far the sketch moves, in Euclidean norm, when one unit is replaced."""


@final
@dataclass(frozen=True)
class ExampleNoise(SketchNoise):
    r"""Hides each single example of a client: replacing one moves a mean of n by at most :math:`2 C / n`.

    Args:
        multiplier: standard deviation over sensitivity; see `noise_multiplier`.

    Raises:
        ValueError: a multiplier that is not positive.

    Example:
        >>> ExampleNoise(4.0).sensitivity(SketchBound(max_norm=0.5, num_examples=100))
        0.01
    """

    multiplier: float

    def __post_init__(self) -> None:
        _require_positive("multiplier", self.multiplier)

    @property
    def unit(self) -> str:
        """One example."""
        return "one example"

    def sensitivity(self, bound: SketchBound) -> float:
        """2 C / n, times the number of passes."""
        return 2 * bound.max_norm * bound.passes / bound.num_examples


@final
@dataclass(frozen=True)
class ClientNoise(SketchNoise):
    """Hides all of a client's data (local differential privacy): replacing it moves the sketch by at most 2 C.

    Args:
        multiplier: standard deviation over sensitivity; see `noise_multiplier`.

    Raises:
        ValueError: a multiplier that is not positive.

    Example:
        >>> ClientNoise(4.0).sensitivity(SketchBound(max_norm=0.5, num_examples=100))
        1.0
    """

    multiplier: float

    def __post_init__(self) -> None:
        _require_positive("multiplier", self.multiplier)

    @property
    def unit(self) -> str:
        """One client."""
        return "all data of one client"

    def sensitivity(self, bound: SketchBound) -> float:
        """2 C."""
        return 2 * bound.max_norm


@final
@dataclass(frozen=True)
class UpdateNoise:
    """Hides all of a client's data in what it trained (local differential privacy).

    The step from what the server has of the client to what it trained is cut to a norm and noised; so two runs on
    different data differ by at most twice that norm.

    Args:
        multiplier: standard deviation over sensitivity; see `noise_multiplier`.
        max_norm: C, > 0: the norm of a step over all shared tensors together.

    Raises:
        ValueError: a number that is not positive.

    Example:
        >>> UpdateNoise(multiplier=4.0, max_norm=0.5).sensitivity
        1.0
    """

    multiplier: float
    max_norm: float

    def __post_init__(self) -> None:
        _require_positive("multiplier", self.multiplier)
        _require_positive("max_norm", self.max_norm)

    @property
    def sensitivity(self) -> float:
        """2 C."""
        return 2 * self.max_norm


def noised_sketch(sketch: Tensor, bound: SketchBound, noise: SketchNoise, stream: NoiseStream) -> Tensor:
    """Add noise to a mean of clipped sketches.

    Args:
        sketch: shape ``[k]``.
        bound: of its examples.
        noise: whom to hide.
        stream: of the turn.

    Returns:
        float32, shape ``[k]``.

    Example:
        >>> stream = NoiseStream(bytes(32), "ward-3", 0)
        >>> bound = SketchBound(max_norm=1.0, num_examples=8)
        >>> noised = noised_sketch(torch.zeros(10_000), bound, ExampleNoise(2.0), stream)
        >>> round(noised.std().item(), 2)  # 2 * (2 / 8)
        0.5
    """
    deviation = noise.multiplier * noise.sensitivity(bound)
    return (sketch.double() + deviation * stream.draw("sketch", sketch)).float()


def noised_update(
    trained: SharedTensors, known: SharedTensors, noise: UpdateNoise, stream: NoiseStream
) -> SharedTensors:
    """Cut the step from known to trained tensors to a norm, add noise, and take it from the known ones.

    Args:
        trained: what the client would send.
        known: what the server has of it already, in the same layout.
        noise: bound and multiplier.
        stream: of the turn.

    Returns:
        Fresh tensors, in the same layout.

    Raises:
        ValueError: layouts that differ.

    Example:
        >>> trained = SharedTensors(FlatTensors.pack({"P": torch.tensor([3.0, 4.0])}))
        >>> known = SharedTensors(FlatTensors.pack({"P": torch.zeros(2)}))
        >>> stream = NoiseStream(bytes(32), "ward-3", 0)
        >>> sent = noised_update(trained, known, UpdateNoise(multiplier=1e-9, max_norm=1.0), stream)
        >>> sent.common.vector  # a step of norm 5 is cut to norm 1
        tensor([0.6000, 0.8000])
    """
    if _layouts(trained) != _layouts(known):
        raise ValueError(
            "What a client shares has changed its names or shapes since it last sent something, so there is no step to "
            "bound. Share the same tensors in every round."
        )
    before = _vector(known)
    step = clip_rows((_vector(trained) - before)[None], noise.max_norm)[0]
    after = before + step + noise.multiplier * noise.sensitivity * stream.draw("update", step)
    split = trained.common.layout.numel
    return SharedTensors(
        FlatTensors(trained.common.layout, after[:split].float()),
        FlatTensors(trained.same_architecture.layout, after[split:].float()),
    )


def _layouts(shared: SharedTensors) -> tuple[object, object]:
    return shared.common.layout, shared.same_architecture.layout


def _vector(shared: SharedTensors) -> Tensor:
    return torch.cat([shared.common.vector, shared.same_architecture.vector]).double()


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"`{name}` must be positive and finite, but is {value}.")
