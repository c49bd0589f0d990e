r"""How the global branch G and the local branch L of an adapted layer are weighed.

Start at `StaticGate`. A gate is a policy: it says what a layer must hold for it, turns that (and, for `InputGate`, a
summary of the input) into :math:`\beta \in (0, 1)`, and leaves to its `Combine` what beta means: `Convex` is the
paper's :math:`\beta G + (1 - \beta) L`, `Additive` is :math:`L + \beta G`, which keeps L at full scale from the start.
To change the rule, subclass `GatePolicy` or `Combine`; nothing else needs to know. (The classes here are leaves, but
not marked ``@final``: jsonargparse, and so LightningCLI, cannot take a final dataclass as default of an abstract type.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

__all__ = ["Additive", "Combine", "Convex", "FixedGate", "GatePolicy", "InputGate", "StaticGate"]


@dataclass(frozen=True)
class Combine(ABC):
    """What beta means for the two branches."""

    @abstractmethod
    def weights(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of G and of L.

        Args:
            beta: ``[]`` or ``[batch]``, between 0 and 1.

        Returns:
            Two tensors of beta's shape.
        """


@dataclass(frozen=True)
class Convex(Combine):
    """The paper's mixture, beta G + (1 - beta) L: with beta = 0.5 both branches start at half scale.

    Example:
        >>> Convex().weights(torch.tensor(0.25))
        (tensor(0.2500), tensor(0.7500))
    """

    def weights(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Beta and 1 - beta."""
        return beta, 1 - beta


@dataclass(frozen=True)
class Additive(Combine):
    """L + beta G: the local branch keeps its full scale, the global one is added to it.

    Example:
        >>> Additive().weights(torch.tensor(0.25))
        (tensor(0.2500), tensor(1.))
    """

    def weights(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Beta and 1."""
        return beta, torch.ones_like(beta)


@dataclass(frozen=True)
class GatePolicy(ABC):
    """A rule that weighs G against L in every adapted layer."""

    combine: Combine = Convex()

    @property
    @abstractmethod
    def reads_input(self) -> bool:
        """Whether beta depends on the input; such a gate cannot be merged into a weight."""

    @abstractmethod
    def parameter_shape(self, in_features: int) -> tuple[int, ...]:
        """Shape of the trained tensor that a layer of this input width holds for the gate; it starts at zero."""

    @abstractmethod
    def beta(self, parameter: Tensor, summary: Tensor | None) -> Tensor:
        """The gate's opening.

        Args:
            parameter: the layer's trained tensor, of `parameter_shape`.
            summary: ``[batch, d_in]``, the mean input over the prompt, for a gate that reads the input; else None.

        Returns:
            ``[]`` or ``[batch]``, in (0, 1).
        """

    def to_dict(self) -> dict[str, Any]:
        """The policy as JSON can hold it; `from_dict` reads it back."""
        return _written(self)

    @staticmethod
    def from_dict(written: Mapping[str, Any]) -> GatePolicy:
        """Read what `to_dict` wrote.

        Only classes that are already imported are considered, so that a file from elsewhere runs no code.

        Raises:
            ValueError: no imported `GatePolicy` of that name.

        Example:
            >>> GatePolicy.from_dict(StaticGate(combine=Additive()).to_dict())
            StaticGate(combine=Additive())
        """
        policy = _read(written)
        if not isinstance(policy, GatePolicy):
            raise ValueError(f"Expected a gate policy, but `{written.get('class')}` is none.")
        return policy


@dataclass(frozen=True)
class StaticGate(GatePolicy):
    """One trained number per adapted layer, beta = sigmoid(number), 0.5 at the start: the paper's. Can be merged.

    Args:
        combine: what beta means.

    Example:
        >>> StaticGate().beta(torch.tensor(0.0), None)
        tensor(0.5000)
    """

    @property
    def reads_input(self) -> bool:
        """No."""
        return False

    def parameter_shape(self, in_features: int) -> tuple[int, ...]:
        """A scalar."""
        return ()

    def beta(self, parameter: Tensor, summary: Tensor | None) -> Tensor:
        """One number for every input, ``[]``."""
        return parameter.sigmoid()


@dataclass(frozen=True)
class FixedGate(GatePolicy):
    """One number for all layers that is not trained, for methods that weigh the branches alike. Can be merged.

    Args:
        combine: what beta means.
        value: beta, 0 to 1.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> FixedGate(value=0.25).beta(torch.tensor(3.0), None)
        tensor(0.2500)
    """

    value: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:
            raise ValueError(f"`value` is the global branch's weight, 0 to 1, but is {self.value}.")

    @property
    def reads_input(self) -> bool:
        """No."""
        return False

    def parameter_shape(self, in_features: int) -> tuple[int, ...]:
        """A scalar, which nothing reads."""
        return ()

    def beta(self, parameter: Tensor, summary: Tensor | None) -> Tensor:
        """The same number always, ``[]``."""
        return torch.full_like(parameter, self.value, requires_grad=False)


@dataclass(frozen=True)
class InputGate(GatePolicy):
    """One number per sample and layer, read from the layer's mean input over the prompt. Cannot be merged.

    beta = sigmoid(w . mean over the prompt's unmasked positions of x). Which positions are the prompt:
    `lightning_pfl.adapters.prompts`. For images it is the mean over all positions.

    Args:
        combine: what beta means.

    Example:
        >>> InputGate().beta(torch.zeros(3), torch.ones(2, 3))
        tensor([0.5000, 0.5000])
    """

    @property
    def reads_input(self) -> bool:
        """Yes."""
        return True

    def parameter_shape(self, in_features: int) -> tuple[int, ...]:
        """A weight per input feature."""
        return (in_features,)

    def beta(self, parameter: Tensor, summary: Tensor | None) -> Tensor:
        """One number per sample, ``[batch]``."""
        assert summary is not None, "a gate that reads the input is given its summary"
        return (summary.to(parameter.dtype) @ parameter).sigmoid()


def _written(policy: GatePolicy | Combine) -> dict[str, Any]:
    written: dict[str, Any] = {"class": f"{type(policy).__module__}.{type(policy).__qualname__}"}
    for item in fields(policy):
        value = getattr(policy, item.name)
        written[item.name] = _written(value) if isinstance(value, (GatePolicy, Combine)) else value
    return written


def _read(written: Mapping[str, Any]) -> GatePolicy | Combine:
    known = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in [*_below(GatePolicy), *_below(Combine)]}
    name = written.get("class")
    if name not in known:
        raise ValueError(
            f"The saved gate is a `{name}`, which is not among the imported ones: {sorted(known)}. "
            "Import the module that defines it, or pass a config with another gate."
        )
    arguments = {key: _read(value) if isinstance(value, Mapping) else value for key, value in written.items()}
    del arguments["class"]
    policy = known[name](**arguments)
    assert isinstance(policy, (GatePolicy, Combine))
    return policy


def _below(kind: type[Any]) -> list[type[Any]]:
    """All imported subclasses, at any depth."""
    return [found for child in kind.__subclasses__() for found in [child, *_below(child)]]
