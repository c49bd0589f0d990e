"""How bases are chosen from what models have in common: `Canonical`, the default, and `LeastSquares`, the paper's way.

A `Rule` sees one layer at a time: what it chose to keep of public data for every student that has the layer, and the
bases that the models had before. `align` does the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar, final

import torch
from torch import Tensor

from lightning_pfl.adapters.aligned import Bases
from lightning_pfl.adapters.gathering import Sink, Site
from lightning_pfl.adapters.layer_sums import LayerSums, ProjectedSums
from lightning_pfl.functional.alignment import choose_ridge, fit_A, fit_B_from_gradients, rotate_B_by_cca
from lightning_pfl.functional.canonical import agreement, common_directions

__all__ = [
    "Canonical",
    "CcaB",
    "FitB",
    "Fitted",
    "GradientB",
    "LeastSquares",
    "Rule",
    "gradient_alignment",
    "papers_alignment",
]

S = TypeVar("S", bound=Sink)


@dataclass(frozen=True, eq=False)
class Fitted:
    """One layer's bases.

    Attributes:
        anchor: the anchor's, changed or not.
        students: by name.
    """

    anchor: Bases
    students: Mapping[str, Bases]


class Rule(ABC, Generic[S]):
    """A way to choose the bases of one layer in all models."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """How often the public data is read."""

    @abstractmethod
    def sink(self, anchor: Site, student: Site) -> S:
        """What is kept of the data for one layer of one student.

        Args:
            anchor: the anchor's layer with the bases it had before.
            student: the student's, likewise.
        """

    @abstractmethod
    def num_bytes(self, anchor: Site, student: Site) -> int:
        """About how much memory the sink of one layer of one student takes."""

    @abstractmethod
    def fit(self, sinks: Mapping[str, S], anchor: Site, students: Mapping[str, Site]) -> Fitted:
        """Choose the bases of one layer.

        Args:
            sinks: per student, what was kept.
            anchor: the layer with the bases it had before.
            students: likewise, by name.
        """


@final
@dataclass(frozen=True)
class Canonical(Rule[LayerSums]):
    """Directions that the models have in common, turned down by how little they agree on data that was not fitted.

    A comes from the inputs of the layer, blind to their mean (which differs between models and is larger than what
    varies), B from loss gradients at its output. All models get new bases, the anchor too: coordinates drawn at random,
    as the paper's anchor has them, mostly have no counterpart in a model of another family. Of two real families, P
    transferred under this rule and not under `LeastSquares` (docs/design/first_experiment.md).

    Args:
        power: columns of B are scaled by their held-out correlation to this power, rows of A likewise but relative to
            the layer's best; so a layer on whose effect the models do not agree fades, and one whose inputs agree
            little still learns. 0 leaves all as they are.
        ridge: on both covariances, in units of their mean variance.

    Source:
        Ours, on Hotelling's canonical correlations (`lightning_pfl.functional.canonical`); the paper fits to an anchor.

    Example:
        >>> Canonical(power=0).passes  # nothing is turned down
        1
    """

    power: float = 2.0
    ridge: float = 0.1

    def __post_init__(self) -> None:
        if not (self.power >= 0 and self.ridge > 0):
            raise ValueError(
                f"`power` must not be negative and `ridge` must be positive, but are {self.power} and {self.ridge}. "
                "Without a ridge directions are fitted to the noise of a few thousand tokens."
            )

    @property
    def passes(self) -> int:
        """Once."""
        return 1

    def sink(self, anchor: Site, student: Site) -> LayerSums:
        """Sums of whole vectors, O(d^2)."""
        return LayerSums(anchor, student)

    def num_bytes(self, anchor: Site, student: Site) -> int:
        """Of the sums."""
        return LayerSums.num_bytes(anchor, student)

    def fit(self, sinks: Mapping[str, LayerSums], anchor: Site, students: Mapping[str, Site]) -> Fitted:
        """Canonical directions of inputs and of gradients."""
        rank, names, sums = anchor.A.shape[0], list(sinks), sinks
        found = common_directions(
            [sums[name].inputs for name in names],
            rank,
            ridge=self.ridge,
            blind_to=[(sums[name].mean, sums[name].anchor_mean) for name in names],
        )
        steps = common_directions([sums[name].gradients for name in names], rank, ridge=self.ridge, centred=False)
        read = [agreement(found.students[i], found.anchor, sums[name].held_out_inputs) for i, name in enumerate(names)]
        done = [
            agreement(steps.students[i], steps.anchor, sums[name].held_out_gradients, centred=False)
            for i, name in enumerate(names)
        ]
        weight_A = _weight(torch.stack(read), self.power)
        weight_A = weight_A / weight_A.max().clamp_min(1e-12)
        scale_A = weight_A / _typical(found.anchor, sums[names[0]])
        scale_B = _weight(torch.stack(done), self.power) / steps.anchor.norm(dim=1).mean()
        return Fitted(
            anchor=_bases(found.anchor, steps.anchor, scale_A, scale_B),
            students={
                name: _bases(found.students[i], steps.students[i], scale_A, scale_B) for i, name in enumerate(names)
            },
        )


class FitB(ABC):
    """A way to choose a student's B when the anchor's stays."""

    @abstractmethod
    def fit(self, sums: ProjectedSums, site: Site, A: Tensor) -> Tensor:
        """Choose B of one layer.

        Args:
            sums: what the layer has in common with the anchor's.
            site: the layer with the bases it had before.
            A: its aligned A, ``[r, d_in]``.

        Returns:
            Shape ``[d_out, r]``.
        """


@final
@dataclass(frozen=True)
class GradientB(FitB):
    """A step along a coordinate changes the student's loss as it changes the anchor's (`fit_B_from_gradients`)."""

    def fit(self, sums: ProjectedSums, site: Site, A: Tensor) -> Tensor:
        """Least squares on loss gradients, the ridge chosen on held-out ones."""
        ridge = choose_ridge(sums.gradients, sums.held_out_gradients)
        return fit_B_from_gradients(sums.gradients, ridge=ridge)


@final
@dataclass(frozen=True)
class CcaB(FitB):
    """The paper's choice (`rotate_B_by_cca`); with A aligned it leaves B where it was.

    Args:
        gamma: added to the diagonals of the summed covariances.
    """

    gamma: float = 1e-4

    def fit(self, sums: ProjectedSums, site: Site, A: Tensor) -> Tensor:
        """Rotate the B that the student had."""
        return rotate_B_by_cca(site.B, A, sums.inputs, gamma=self.gamma)


@final
@dataclass(frozen=True)
class LeastSquares(Rule[ProjectedSums]):
    """The anchor keeps its random bases; a student's A x follows the anchor's z as closely as it can.

    Args:
        B: how the student's B is chosen.
        orthonormal_only: replace each A by the nearest matrix with orthonormal rows, as in the paper.

    Source:
        arXiv:2506.11024, initial alignment, is ``LeastSquares(CcaB(), orthonormal_only=True)`` in closed form.

    Example:
        >>> LeastSquares(CcaB(), orthonormal_only=True).B
        CcaB(gamma=0.0001)
    """

    B: FitB = field(default_factory=GradientB)
    orthonormal_only: bool = False

    @property
    def passes(self) -> int:
        """Once."""
        return 1

    def sink(self, anchor: Site, student: Site) -> ProjectedSums:
        """Sums of the student's vectors and the anchor's in rank space, O(d^2 + d r)."""
        return ProjectedSums(anchor, student)

    def num_bytes(self, anchor: Site, student: Site) -> int:
        """Of the sums."""
        return ProjectedSums.num_bytes(anchor, student)

    def fit(self, sinks: Mapping[str, ProjectedSums], anchor: Site, students: Mapping[str, Site]) -> Fitted:
        """Least squares, student by student."""
        fitted = {}
        for name, found in sinks.items():
            ridge = choose_ridge(found.inputs, found.held_out_inputs)
            A = fit_A(found.inputs, ridge=ridge, orthonormal_only=self.orthonormal_only).A
            B = self.B.fit(found, students[name], A)
            fitted[name] = (A.float().cpu(), B.float().cpu())
        return Fitted((anchor.A.float().cpu(), anchor.B.float().cpu()), fitted)


def _bases(A: Tensor, B: Tensor, scale_A: Tensor, scale_B: Tensor) -> Bases:
    return (A * scale_A[:, None]).float().cpu(), (B * scale_B[:, None]).T.float().contiguous().cpu()


def _weight(agreements: Tensor, power: float) -> Tensor:
    """Per coordinate, from what students agree with the anchor on: the mean over students."""
    return agreements.clamp_min(0).pow(power).mean(0)


def _typical(directions: Tensor, sums: LayerSums) -> Tensor:
    """Root mean square of the anchor's coordinates, so that z has the size of one."""
    zz = sums.inputs.products(centred=True)[2] / sums.inputs.count
    return ((directions @ zz) * directions).sum(1).mean().sqrt()


def papers_alignment() -> LeastSquares:
    """The paper's initial alignment, in closed form.

    Source:
        arXiv:2506.11024, initial alignment.

    Example:
        >>> papers_alignment().orthonormal_only
        True
    """
    return LeastSquares(CcaB(), orthonormal_only=True)


def gradient_alignment() -> LeastSquares:
    """Least squares with B from loss gradients, for configuration files, which cannot say how B is chosen.

    Source:
        Ours (`fit_B_from_gradients`).

    Example:
        >>> gradient_alignment().B
        GradientB()
    """
    return LeastSquares(GradientB())
