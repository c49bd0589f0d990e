r"""From a gradient of millions of numbers to a sketch of thousands that keeps inner products.

Start at `CountSketch`. Whoever uses the same ``size`` and ``seed`` gets the same projection to the last bit, so that
sketches made by different clients can be compared.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

__all__ = ["CountSketch", "mean_of_clipped"]


@final
class CountSketch:
    r"""A seeded random projection :math:`R^d \to R^k` that adds every number, with a random sign, to a random bucket.

    For any two vectors the sketches' inner product is right on average over seeds, with variance at most
    :math:`(\|x\|^2 \|y\|^2 + \langle x, y \rangle^2) / k`: at k = 16,384 a cosine is off by less than 0.011 in
    standard deviation. No :math:`k \times d` matrix is stored, only a bucket and a sign per number: 5 bytes each.

    The projection runs on the CPU, where the sum has one order and therefore one result.

    Args:
        size: k, the length of a sketch.
        seed: equal seeds give equal projections.

    Raises:
        ValueError: a size below 1.

    Source:
        Charikar, Chen and Farach-Colton, ICALP 2002; as feature hashing, Weinberger et al., ICML 2009, arXiv:0902.2206.

    Example:
        >>> project = CountSketch(4096, seed=0)
        >>> x = torch.linspace(-1, 1, 100_000)
        >>> abs(1 - (project(x) @ project(x) / (x @ x)).item()) < 0.06
        True
    """

    def __init__(self, size: int, *, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"The length of a sketch must be at least 1, but is {size}.")
        self.size = size
        self.seed = seed
        self._hashes: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, vector: Tensor) -> Tensor:
        """Project one gradient.

        Args:
            vector: any shape, read as a vector of d numbers; any device and dtype.

        Returns:
            float32, shape ``[k]``, on the CPU.
        """
        flat = vector.detach().reshape(-1).to(device="cpu", dtype=torch.float32)
        buckets, signs = self._hash(flat.numel())
        return torch.zeros(self.size).index_add_(0, buckets, flat * signs)

    def _hash(self, numel: int) -> tuple[Tensor, Tensor]:
        """Buckets int32 and signs int8, both ``[numel]``; drawn on first use."""
        if numel not in self._hashes:
            generator = torch.Generator().manual_seed(self.seed)
            buckets = torch.randint(self.size, (numel,), generator=generator, dtype=torch.int32)
            signs = torch.randint(2, (numel,), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
            self._hashes[numel] = (buckets, signs)
        return self._hashes[numel]

    def __getstate__(self) -> dict[str, Any]:
        """Hashes do not travel: they are drawn again from the seed."""
        return {"size": self.size, "seed": self.seed, "_hashes": {}}


def mean_of_clipped(sketches: Tensor, max_norm: float | None) -> Tensor:
    """Average over examples, after cutting each example's sketch to a norm, so that none counts for more than that.

    Args:
        sketches: one row per example, shape ``[n, k]``.
        max_norm: C, > 0; a longer row is scaled down to it. None: rows stay as they are.

    Returns:
        Shape ``[k]``.

    Example:
        >>> mean_of_clipped(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), max_norm=1.0)
        tensor([0.3000, 0.9000])
    """
    if max_norm is None:
        return sketches.mean(dim=0)
    norms: Tensor = torch.linalg.vector_norm(sketches, dim=1, keepdim=True)
    return (sketches * (max_norm / norms.clamp(min=max_norm))).mean(dim=0)
