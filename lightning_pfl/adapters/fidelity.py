"""How faithfully a model follows the anchor under given bases, on public data that was not fitted.

Start at `Fidelity`. It sums r and r x r numbers only. What it says is a first-order matter, layer by layer;
`lightning_pfl.adapters.transfer.transfer` says what a trained P is worth, all layers together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_pfl.adapters.gathering import Seen

__all__ = ["Errors", "Fidelity", "table"]

Bases = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Errors:
    """What one layer of a model misses of the anchor's; 0 is perfect, above 1 worse than nothing.

    Attributes:
        missed_A: squared error of z = A x against the anchor's z, as a share of how the latter varies. 1: as good as
            answering its mean.
        missed_B: squared error of B' g against the anchor's, as a share of the latter. 1: as good as zero.
        missed_P: squared error of what a change of P does to the loss of a record, to first order and over all
            directions of P alike, as a share of what it does in the anchor. 1: as good as an output of zero.
        agreement_P: cosine between the gradients of P in the two models, over records; 0 for unrelated models. Unlike
            the error it does not count a difference in scale.
    """

    missed_A: float
    missed_B: float
    missed_P: float
    agreement_P: float


@final
class Fidelity:
    """Sums over records for one layer of one model under one pair of bases.

    Args:
        student: A ``[r, d_in]`` and B ``[d_out, r]`` of the model.
        anchor: of the anchor.

    Example:
        >>> import torch
        >>> bases = (torch.eye(1, 2), torch.eye(2, 1))
        >>> fidelity = Fidelity(bases, bases)
        >>> x, g = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]])
        >>> fidelity.add(Seen(x, x, g, g, torch.zeros(2)))
        >>> fidelity.errors()
        Errors(missed_A=0.0, missed_B=0.0, missed_P=0.0, agreement_P=1.0)
    """

    def __init__(self, student: Bases, anchor: Bases) -> None:
        self._student, self._anchor = student, anchor
        self.count = 0
        self._sums: dict[str, float] = dict.fromkeys(("A", "zz", "B", "ww", "P", "own", "theirs", "both"), 0.0)
        self._z = torch.zeros(anchor[0].shape[0], dtype=torch.float64)

    @torch.no_grad()
    def add(self, seen: Seen) -> None:
        """Take in one record."""
        (A, B), (anchor_A, anchor_B) = self._student, self._anchor
        z, w = seen.inputs.double() @ A.to(seen.inputs).double().T, seen.gradients.double() @ B.to(seen.inputs).double()
        anchor_z = seen.anchor_inputs.double() @ anchor_A.to(seen.inputs).double().T
        anchor_w = seen.anchor_gradients.double() @ anchor_B.to(seen.inputs).double()
        step, anchor_step = w.T @ z, anchor_w.T @ anchor_z  # gradients of P, over the record
        self.count += len(z)
        self._z += anchor_z.sum(0).cpu()
        found = {
            "A": (z - anchor_z).square(),
            "zz": anchor_z.square(),
            "B": (w - anchor_w).square(),
            "ww": anchor_w.square(),
            "P": (step - anchor_step).square(),
            "own": step.square(),
            "theirs": anchor_step.square(),
            "both": step * anchor_step,
        }
        for name, value in found.items():
            self._sums[name] += float(value.sum())

    def errors(self) -> Errors:
        """Over all records so far; infinite where the anchor's own are all zero."""
        sums = self._sums
        varies = sums["zz"] - float(self._z.square().sum()) / max(self.count, 1)
        length = (sums["own"] * sums["theirs"]) ** 0.5
        return Errors(
            _share(sums["A"], varies if varies > 1e-12 * sums["zz"] else 0.0),
            _share(sums["B"], sums["ww"]),
            _share(sums["P"], sums["theirs"]),
            sums["both"] / length if length > 0 else 0.0,
        )


def table(rows: Mapping[tuple[str, str], tuple[Errors, Errors]]) -> str:
    """Markdown: a line per model and layer, errors before and after.

    Args:
        rows: by model and address.
    """
    head = "| model | tower | block | role | z missed | B' g missed | P missed | P agrees |"
    lines = [head, "|" + " --- |" * 8]
    for (model, layer), (before, after) in rows.items():
        pairs = zip(_values(before), _values(after), strict=True)
        told = " | ".join(f"{_short(old)} → {_short(new)}" for old, new in pairs)
        lines.append(f"| {model} | {' | '.join(layer.split('/'))} | {told} |")
    return "\n".join(lines)


def _values(errors: Errors) -> tuple[float, ...]:
    return errors.missed_A, errors.missed_B, errors.missed_P, errors.agreement_P


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.1e}"


def _share(error: float, of: float) -> float:
    return error / of if of > 0 else float("inf")
