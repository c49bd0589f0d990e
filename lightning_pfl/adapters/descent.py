"""Bases by gradient descent on public data, for models whose widths squared do not fit into memory.

Start at `GradientDescent`. It is `LeastSquares` without its d x d sums: A and B are learned while the data streams by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_pfl.adapters.gathering import Seen, Sink, Site
from lightning_pfl.adapters.rules import Fitted, Rule

__all__ = ["Descent", "GradientDescent"]

_DECAY, _SQUARED_DECAY, _TINY = 0.9, 0.999, 1e-12  # Adam's own


@final
@dataclass(frozen=True)
class GradientDescent(Rule["Descent"]):
    """The anchor keeps its random bases; a student's A and B follow by Adam, one step per record.

    Memory is O((d_in + d_out) r) per layer and student, against O(d_in^2 + d_out^2) of `LeastSquares`. It converges to
    the same bases, slowly where inputs are strongly anisotropic, as those of transformers are: prefer `LeastSquares`
    while its sums fit.

    Args:
        passes: over the public data.
        lr: step size, in units of a typical entry of A or of B. It falls as 1 / (1 + step / 100).
        penalty: on rows of A that are not orthogonal, :math:`|\\hat A \\hat A^\\top - I|^2` with rows of length one,
            beside a data term that is 1 where nothing is explained. The paper has 0.5, on the columns.
        orthonormal_only: in the end, replace each A by the nearest matrix with orthonormal rows, as in the paper.
        learn_B: B follows loss gradients. False: the student keeps its random B, which is what the paper's CCA step
            amounts to once A is aligned.

    Source:
        arXiv:2506.11024, initial alignment: A by AdamW (5e-5, one pass, penalty 0.5, then orthonormal). There the
        penalty is on d_in x d_in cosines of columns; ours on r x r cosines of rows has the same minimiser up to scale.

    Example:
        >>> GradientDescent(passes=3).lr
        0.05
    """

    passes: int = 4
    lr: float = 0.05
    penalty: float = 0.0
    orthonormal_only: bool = False
    learn_B: bool = True

    def __post_init__(self) -> None:
        if not (self.passes >= 1 and self.lr > 0 and self.penalty >= 0):
            raise ValueError(
                "`passes` must be at least 1, `lr` positive and `penalty` not negative, but are "
                f"{self.passes}, {self.lr} and {self.penalty}."
            )

    def sink(self, anchor: Site, student: Site) -> Descent:
        """The bases on their way, with Adam's moments."""
        return Descent(anchor, student, self)

    def num_bytes(self, anchor: Site, student: Site) -> int:
        """Three matrices each for A and for B, in float32."""
        d_in, d_out, rank = student.shape
        return 3 * 4 * rank * (d_in + d_out)

    def fit(self, sinks: Mapping[str, Descent], anchor: Site, students: Mapping[str, Site]) -> Fitted:
        """Take what was learned."""
        return Fitted(
            anchor=(anchor.A.float().cpu(), anchor.B.float().cpu()),
            students={name: sink.bases(orthonormal=self.orthonormal_only) for name, sink in sinks.items()},
        )


@final
class Descent(Sink):
    """A and B of one layer of one student, as they are learned.

    Args:
        anchor: whose z and B' g are followed.
        student: where the descent starts.
        rule: step size and penalty.
    """

    def __init__(self, anchor: Site, student: Site, rule: GradientDescent) -> None:
        self._anchor, self._rule = anchor, rule
        self._A = _Weight(student.A.float())
        self._B = _Weight(student.B.float().T.contiguous())
        self._count = 0

    @property
    def count(self) -> int:
        """How many places were learned from, over all passes."""
        return self._count

    @torch.no_grad()
    def add(self, seen: Seen, *, is_held_out: bool) -> None:
        """One step on a record that is not held out."""
        if is_held_out:
            return
        self._count += len(seen.places)
        z = seen.anchor_inputs.float() @ self._anchor.A.float().T
        self._A.step(seen.inputs.float(), z, self._rule.lr, self._rule.penalty)
        if self._rule.learn_B:
            steps = seen.anchor_gradients.float() @ self._anchor.B.float()
            self._B.step(seen.gradients.float(), steps, self._rule.lr, 0.0)

    def bases(self, *, orthonormal: bool) -> tuple[Tensor, Tensor]:
        """A ``[r, d_in]`` and B ``[d_out, r]``."""
        A = self._A.value
        if orthonormal:
            U, _, Vh = torch.linalg.svd(A, full_matrices=False)
            A = U @ Vh
        return A.cpu(), self._B.value.T.contiguous().cpu()


class _Weight:
    """W ``[r, d]`` that learns to make W x equal z."""

    def __init__(self, value: Tensor) -> None:
        self.value = value.clone()
        self._first, self._second = torch.zeros_like(value), torch.zeros_like(value)
        self._entry = value.square().mean().sqrt()
        self._steps, self._size = 0, 0.0

    def step(self, x: Tensor, z: Tensor, lr: float, penalty: float) -> None:
        if not (torch.isfinite(x).all() and torch.isfinite(z).all()):
            raise ValueError(
                "Public data gave an activation or a gradient that is not finite. Run the models in float32 or "
                "bfloat16, and leave out texts on which a loss is not finite."
            )
        self._steps += 1
        size = float(z.square().mean())
        self._size += (size - self._size) / self._steps  # so far; makes the data term 1 for an answer of zero
        gradient = 2 * (x @ self.value.T - z).T @ x / (x.shape[0] * z.shape[1] * max(self._size, _TINY))
        if penalty:
            gradient += penalty * _slope_of_penalty(self.value)
        self._first.lerp_(gradient, 1 - _DECAY)
        self._second.lerp_(gradient.square(), 1 - _SQUARED_DECAY)
        first = self._first / (1 - _DECAY**self._steps)
        second = self._second / (1 - _SQUARED_DECAY**self._steps)
        rate = lr * self._entry / (1 + self._steps / 100)
        self.value -= rate * first / (second.sqrt() + 1e-8 * second.max().sqrt() + 1e-30)


def _slope_of_penalty(A: Tensor) -> Tensor:
    """Gradient of the mean squared cosine between different rows of A."""
    lengths = A.norm(dim=1, keepdim=True).clamp_min(_TINY)
    rows = A / lengths
    cosines = rows @ rows.T
    cosines.fill_diagonal_(0)
    slope = 4 * cosines @ rows / max(len(A) * (len(A) - 1), 1)
    tangent: Tensor = (slope - (slope * rows).sum(1, keepdim=True) * rows) / lengths
    return tangent
