"""Sums over public data that closed-form rules fit one layer from: O(d^2) numbers, however much data there is.

Start at `LayerSums`. `ProjectedSums` is the smaller form, for rules that leave the anchor's bases as they are.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from lightning_pfl.adapters.gathering import Seen, Sink, Site
from lightning_pfl.functional.alignment import PairedSums

__all__ = ["LayerSums", "ProjectedSums"]


@final
class ProjectedSums(Sink):
    """The student's whole vectors beside the anchor's in rank space.

    Args:
        anchor: the anchor's layer, whose bases stay.
        student: the student's.

    Attributes:
        inputs: the student's inputs ``[d_in]`` and the anchor's z = A x ``[r]``.
        gradients: the student's gradients ``[d_out]`` and the anchor's B' g ``[r]``.
        held_out_inputs: as `inputs`, over held-out records.
        held_out_gradients: as `gradients`, over held-out records.
    """

    def __init__(self, anchor: Site, student: Site) -> None:
        self._anchor = anchor
        d_in, d_out, rank = student.shape
        self.inputs, self.held_out_inputs = (PairedSums(d_in, rank, device=student.A.device) for _ in range(2))
        self.gradients, self.held_out_gradients = (PairedSums(d_out, rank, device=student.A.device) for _ in range(2))

    @property
    def count(self) -> int:
        """How many places the fit has seen."""
        return self.inputs.count

    def add(self, seen: Seen, *, is_held_out: bool) -> None:
        """Project what is the anchor's, and sum up."""
        inputs, gradients = (
            (self.held_out_inputs, self.held_out_gradients) if is_held_out else (self.inputs, self.gradients)
        )
        inputs.add(seen.inputs, seen.anchor_inputs @ self._anchor.A.T.to(seen.anchor_inputs))
        gradients.add(seen.gradients, seen.anchor_gradients @ self._anchor.B.to(seen.anchor_gradients))

    @staticmethod
    def num_bytes(anchor: Site, student: Site) -> int:
        """What an instance takes: 8 bytes per entry of two sums each of inputs and of gradients."""
        d_in, d_out, rank = student.shape
        return sum(2 * 8 * (d * d + d * rank + rank * rank + d + rank) for d in (d_in, d_out))


@final
class LayerSums(Sink):
    """Whole vectors of both models.

    Of the inputs it keeps only what varies between the rows of a record at one place (what the picture changes, not
    which question was asked or how far it was read), at places on which the loss of both models depends.

    Args:
        anchor: the anchor's layer.
        student: the student's.

    Attributes:
        inputs: the student's inputs ``[d_in]`` and the anchor's.
        gradients: the student's gradients ``[d_out]`` and the anchor's.
        held_out_inputs: as `inputs`, over held-out records.
        held_out_gradients: as `gradients`, over held-out records.
    """

    def __init__(self, anchor: Site, student: Site) -> None:
        (d_in, d_out, _), (anchor_in, anchor_out, _) = student.shape, anchor.shape
        device = student.A.device
        self.inputs, self.held_out_inputs = (PairedSums(d_in, anchor_in, device=device) for _ in range(2))
        self.gradients, self.held_out_gradients = (PairedSums(d_out, anchor_out, device=device) for _ in range(2))
        self._num_raw = 0
        self._raw = torch.zeros(d_in, dtype=torch.float64, device=device)
        self._anchor_raw = torch.zeros(anchor_in, dtype=torch.float64, device=device)

    @property
    def count(self) -> int:
        """How many places the fit has seen."""
        return self.inputs.count

    @property
    def mean(self) -> Tensor:
        """The student's mean input, ``[d_in]``, before anything is taken off."""
        return self._raw / max(self._num_raw, 1)

    @property
    def anchor_mean(self) -> Tensor:
        """The anchor's mean input, ``[d_in of the anchor]``, likewise."""
        return self._anchor_raw / max(self._num_raw, 1)

    def add(self, seen: Seen, *, is_held_out: bool) -> None:
        """Take off what all rows have in common at a place, and sum up."""
        inputs, gradients = (
            (self.held_out_inputs, self.held_out_gradients) if is_held_out else (self.inputs, self.gradients)
        )
        gradients.add(seen.gradients, seen.anchor_gradients)
        counted = seen.gradients.any(1) & seen.anchor_gradients.any(1)
        x, anchor_x, places = seen.inputs[counted], seen.anchor_inputs[counted], seen.places[counted]
        if not is_held_out:
            self._num_raw += len(x)
            self._raw += x.to(self._raw).sum(0)
            self._anchor_raw += anchor_x.to(self._raw).sum(0)
        inputs.add(_within(x, places), _within(anchor_x, places))

    @staticmethod
    def num_bytes(anchor: Site, student: Site) -> int:
        """What an instance takes: 8 bytes per entry of two sums each of inputs and of gradients."""
        (d_in, d_out, _), (anchor_in, anchor_out, _) = student.shape, anchor.shape
        pairs = ((d_in, anchor_in), (d_out, anchor_out))
        return sum(2 * 8 * (own * own + own * other + other * other + own + other) for own, other in pairs)


def _within(values: Tensor, places: Tensor) -> Tensor:
    """Deviations from the mean over a record's rows at one place; where only one row has the place, the row itself."""
    _, group, sizes = places.unique(return_inverse=True, return_counts=True)
    means = values.new_zeros(len(sizes), values.shape[1]).index_add_(0, group, values) / sizes[:, None]
    deviations = (values - means[group]) * (sizes / (sizes - 1).clamp_min(1)).sqrt()[group, None].to(values)
    return torch.where((sizes[group] > 1)[:, None], deviations, values)
