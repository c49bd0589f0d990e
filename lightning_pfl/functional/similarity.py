r"""How alike two clients' tasks are, from their sketches. Start at `Cosine`; `ColumnCosine` is the reference code's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["ColumnCosine", "Cosine", "Similarity", "cosine_matrix"]


class Similarity(ABC):
    """Compares clients by their sketches. Leaves are frozen dataclasses: settings, no memory."""

    @abstractmethod
    def matrix(self, sketches: Tensor) -> Tensor:
        """Compare every pair of clients.

        Args:
            sketches: float32, shape ``[N, k]``, one row per client.

        Returns:
            float32, shape ``[N, N]``, symmetric, from -1 to 1, ones on the diagonal.

        Raises:
            ValueError: sketches of a form that cannot be compared in this way.
        """


@final
@dataclass(frozen=True)
class Cosine(Similarity):
    """The cosine of whole sketches.

    Source:
        Co-LoRA, arXiv:2506.11024, relevance as written in the paper.

    Example:
        >>> Cosine().matrix(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        tensor([[1.0000, 0.7071],
                [0.7071, 1.0000]])
    """

    def matrix(self, sketches: Tensor) -> Tensor:
        """One matrix product."""
        return cosine_matrix(sketches)


@final
@dataclass(frozen=True)
class ColumnCosine(Similarity):
    """The mean over columns of the columns' cosines, which is what the paper's code computes instead of its formula.

    A sketch is read as a matrix ``[k / columns, columns]``, and every column counts the same, however short it is: near
    zero ones, which are noise, dilute the mean. It means something only for sketches that keep the columns of a
    gradient apart, such as those of `ColumnSketch`; a count sketch does not.

    Args:
        columns: of the matrix; k must be a multiple of it.

    Raises:
        ValueError: ``columns`` below 1.

    Source:
        The code beside arXiv:2506.11024, which loops over columns in bfloat16; here in float32 by one matrix product.

    Example:
        >>> one, two = [100.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0]  # row by row: columns (100, 0) and (1, 0), ...
        >>> ColumnCosine(2).matrix(torch.tensor([one, two]))  # columns have cosines 1 and 0
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
    """

    columns: int

    def __post_init__(self) -> None:
        if self.columns < 1:
            raise ValueError(f"`columns` must be at least 1, but is {self.columns}.")

    def matrix(self, sketches: Tensor) -> Tensor:
        """One matrix product of sketches whose columns have been normalised."""
        return cosine_matrix(sketches, columns=self.columns)


def cosine_matrix(sketches: Tensor, *, columns: int = 1) -> Tensor:
    r"""Cosine of every pair of sketches, by one matrix product in float32.

    Args:
        sketches: shape ``[N, k]``, one row per client.
        columns: read a row as a matrix ``[k / columns, columns]`` and average the cosines of its columns, each with
            equal weight. 1: the cosine of the whole sketch.

    Returns:
        float32, shape ``[N, N]``, symmetric. A row of zeros has cosine 0 with all others and 1 with itself.

    Raises:
        ValueError: not a matrix, or ``k`` is not a multiple of ``columns``.

    Source:
        Co-LoRA, arXiv:2506.11024, relevance :math:`S_{ij} = \cos(\tilde g_i, \tilde g_j)`.

    Example:
        >>> cosine_matrix(torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]))
        tensor([[1.0000, 0.0000, 0.7071],
                [0.0000, 1.0000, 0.7071],
                [0.7071, 0.7071, 1.0000]])
    """
    if sketches.ndim != 2 or columns < 1 or sketches.shape[1] % columns:
        raise ValueError(
            f"Sketches must form a matrix [clients, k] with k a multiple of `columns`, "
            f"but have shape {tuple(sketches.shape)} with {columns} columns."
        )
    count = sketches.shape[0]
    by_column = sketches.detach().float().reshape(count, -1, columns)
    norms = torch.linalg.vector_norm(by_column, dim=1, keepdim=True)
    unit = (by_column / norms.where(norms > 0, 1.0)).reshape(count, -1)
    cosines = unit @ unit.T / columns
    symmetric: Tensor = ((cosines + cosines.T) / 2).clamp(-1.0, 1.0)
    return symmetric.fill_diagonal_(1.0)
