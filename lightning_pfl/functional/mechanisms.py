r"""How much noise what a client sends needs: whom it hides, how far that one can move it, and the noise.

Start at `ExampleNoise`. A mechanism is a frozen dataclass of settings; `noised_sketch` and `noised_update` are the two
releases there are. The noise is always Gaussian with a standard deviation of `multiplier` times the sensitivity, and
two data sets are neighbours when one unit (an example, or all that a client has) is replaced by another.
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

_LENGTH = 1 - 2.0**-20  # of a sketch that is scaled to length one; not a bit above that, after rounding


@dataclass(frozen=True)
class SketchBound:
    """What bounds one example's part in a sketch, which is a mean over examples.

    Attributes:
        max_norm: C, no example's own sketch is longer.
        num_examples: n, over how many the mean is, > 0.
        repeats: how often one example can be among them.
    """

    max_norm: float
    num_examples: int
    repeats: int = 1


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

    def __repr__(self) -> str:
        """Without the key."""
        return f"NoiseStream(client_id={self.client_id!r}, round={self.round})"


class SketchNoise(ABC):
    """Whom the noise on a sketch hides. Leaves are frozen dataclasses.

    Attributes:
        multiplier: standard deviation of the noise over the sensitivity.
        unit: who is hidden, in words.
        bounds_examples: whether it is each example's part that must be bounded.
    """

    multiplier: float
    unit: str
    bounds_examples: bool

    @abstractmethod
    def bounded(self, sketch: Tensor) -> Tensor:
        """The sketch as it would be sent without noise: float64 ``[k]``."""

    @abstractmethod
    def sensitivity(self, bound: SketchBound | None) -> float:
        """How far that can move, in Euclidean norm, when one unit is replaced.

        Args:
            bound: of the sketch's examples; None where nothing bounds them.
        """


@final
@dataclass(frozen=True)
class ExampleNoise(SketchNoise):
    r"""Hides each single example of a client: replacing one moves a mean of n by at most :math:`2 C / n`.

    Each example's sketch is clipped to the probe's `max_norm` (C), and noise is added once to the mean of all that a
    turn has sketched. An example that is sketched m times in a turn (in m passes over the data) moves it m times as
    far, and the noise is m times as strong. `RelevanceProbe` then takes its batches in an order of its own, as that of
    the training may depend on what examples hold: dropout draws more random numbers for a longer text.

    Args:
        multiplier: standard deviation over sensitivity; see `PrivacyBudget.noise_multiplier`.

    Raises:
        ValueError: a multiplier that is not positive.

    Example:
        >>> ExampleNoise(4.0).sensitivity(SketchBound(max_norm=0.5, num_examples=100))
        0.01
    """

    multiplier: float
    unit = "one example"
    bounds_examples = True

    def __post_init__(self) -> None:
        _require_positive("multiplier", self.multiplier)

    def bounded(self, sketch: Tensor) -> Tensor:
        """As it is: its examples are bounded."""
        return sketch.double()

    def sensitivity(self, bound: SketchBound | None) -> float:
        """2 C m / n, for an example that occurs m times among n."""
        if bound is None:
            raise ValueError(
                "Noise that hides single examples needs a bound on each example's part in a sketch, but there is none. "
                "Use `RelevanceProbe` with an `ExampleProbe` that has a `max_norm`, or `ClientNoise`."
            )
        return 2 * bound.max_norm * min(bound.repeats, bound.num_examples) / bound.num_examples


@final
@dataclass(frozen=True)
class ClientNoise(SketchNoise):
    """Hides all of a client's data (local differential privacy): a sketch of length one can turn round, which is 2.

    A turn's mean sketch is scaled to length one, whatever it was. Clipping would bound it too, but would leave a short
    sketch short under the same noise, and relevance does not read lengths.

    Args:
        multiplier: standard deviation over sensitivity; see `PrivacyBudget.noise_multiplier`.

    Raises:
        ValueError: a multiplier that is not positive.

    Example:
        >>> noise = ClientNoise(4.0)
        >>> noise.bounded(torch.tensor([30.0, 40.0])), noise.sensitivity(None)
        (tensor([0.6000, 0.8000], dtype=torch.float64), 2.0)
    """

    multiplier: float
    unit = "all data of one client"
    bounds_examples = False

    def __post_init__(self) -> None:
        _require_positive("multiplier", self.multiplier)

    def bounded(self, sketch: Tensor) -> Tensor:
        """Of length one; zeros stay zeros."""
        length = torch.linalg.vector_norm(sketch.double())
        return sketch.double() * (_LENGTH / length) if length > 0 else torch.zeros_like(sketch.double())

    def sensitivity(self, bound: SketchBound | None) -> float:
        """2."""
        return 2.0


@final
@dataclass(frozen=True)
class UpdateNoise:
    """Hides all of a client's data in what it trained (local differential privacy).

    The step from what the server has of the client to what it trained is cut to a norm and noised; so what two data
    sets send differs by at most twice that norm. All that a client shares is one step: P and Q, and A and B where
    conventional layers are shared, which are many numbers and take much noise (``CoLoRA(private_layers=False)`` leaves
    them out). The client itself goes on from what it trained, without noise.

    Args:
        multiplier: standard deviation over sensitivity; see `PrivacyBudget.noise_multiplier`.
        max_norm: C, > 0: the norm of a step over all shared tensors together.

    Raises:
        ValueError: a number that is not positive.

    Example:
        >>> UpdateNoise(multiplier=4.0, max_norm=0.5).sensitivity
        1.0
    """

    multiplier: float
    max_norm: float
    unit = "all data of one client"

    def __post_init__(self) -> None:
        _require_positive("multiplier", self.multiplier)
        _require_positive("max_norm", self.max_norm)

    @property
    def sensitivity(self) -> float:
        """2 C."""
        return 2 * self.max_norm


def noised_sketch(sketch: Tensor, noise: SketchNoise, stream: NoiseStream, *, bound: SketchBound | None) -> Tensor:
    """Bound a turn's mean sketch, add noise, and scale the sum to length one.

    The scaling tells nothing more, since it sees the noisy sketch only. Without it lengths would be those of the noise,
    which differ between clients by their numbers of examples, and a guard that compares lengths would be misled.

    Args:
        sketch: shape ``[k]``.
        noise: whom to hide.
        stream: of the turn.
        bound: of the sketch's examples; None where nothing bounds them.

    Returns:
        float32, shape ``[k]``, of length one.

    Raises:
        ValueError: NaN or infinity in the sketch, or no bound where the noise relies on one.

    Example:
        >>> stream, bound = NoiseStream(bytes(32), "ward-3", 0), SketchBound(max_norm=5.0, num_examples=1000)
        >>> noised = noised_sketch(torch.tensor([3.0, 4.0]), ExampleNoise(4.0), stream, bound=bound)
        >>> (noised - torch.tensor([0.6, 0.8])).norm() < 0.05
        tensor(True)
    """
    _require_finite("sketch", sketch)
    deviation = noise.multiplier * noise.sensitivity(bound)
    value = noise.bounded(sketch)
    noised = value + deviation * stream.draw("sketch", value)
    length: Tensor = torch.linalg.vector_norm(noised)
    return (noised / length).float()


def noised_update(
    trained: SharedTensors, known: SharedTensors, noise: UpdateNoise, stream: NoiseStream
) -> SharedTensors:
    """Cut the step from known to trained tensors to a norm, add noise, and take it from the known ones.

    Args:
        trained: what the client would send.
        known: what the server has of it already, in the same layout; must not depend on what is to be hidden.
        noise: bound and multiplier.
        stream: of the turn.

    Returns:
        Fresh tensors, in the same layout.

    Raises:
        ValueError: layouts that differ, or NaN or infinity in what was trained.

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
    before, after = _vector(known), _vector(trained)
    _require_finite("update", after)
    step = clip_rows((after - before)[None], noise.max_norm)[0]
    sent = before + step + noise.multiplier * noise.sensitivity * stream.draw("update", step)
    split = trained.common.layout.numel
    return SharedTensors(
        FlatTensors(trained.common.layout, sent[:split].float()),
        FlatTensors(trained.same_architecture.layout, sent[split:].float()),
    )


def _layouts(shared: SharedTensors) -> tuple[object, object]:
    return shared.common.layout, shared.same_architecture.layout


def _vector(shared: SharedTensors) -> Tensor:
    return torch.cat([shared.common.vector, shared.same_architecture.vector]).double()


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"`{name}` must be positive and finite, but is {value}.")


def _require_finite(name: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise ValueError(
            f"A client's {name} holds NaN or infinity, which no bound and no noise can hide, so it is not sent. Has "
            "the training diverged? Lower its learning rate, or look at the precision of what made it."
        )
