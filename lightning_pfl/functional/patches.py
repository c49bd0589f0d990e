r"""Convolutions as linear maps of patches, so that the arithmetic of adapters is the same for them.

Start at `Patches`. A convolution without groups is one matrix, ``[d_out, c_in * prod(kernel)]``, applied to the patch
of the input under each position of the kernel; padding, stride and dilation only say which patches there are. So a
Co-LoRA layer around it reads every patch with A (r filters of the base's own kernel, stride, padding and dilation),
mixes the r numbers of each position with P and Q, and writes with B (a convolution with a kernel of one). Q is added
after A has read the padded border, so it is one constant for all positions and merges into the bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Patches"]

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Patches:
    """Which patches of its input a convolution reads, in one to three spatial dimensions.

    Attributes:
        kernel: size of a patch.
        stride: steps between patches.
        padding: positions added before and after, per dimension.
        dilation: steps inside a patch.
        padding_mode: what the added positions hold, by torch's name: ``"zeros"``, ``"reflect"``, ``"replicate"`` or
            ``"circular"``.

    Example:
        >>> import torch
        >>> patches = Patches(kernel=(2,), stride=(1,), padding=((0, 0),), dilation=(1,))
        >>> x = torch.tensor([[[1.0, 2.0, 4.0]]])
        >>> patches.read(x, torch.tensor([[1.0, 10.0]])).tolist()
        [[[21.0, 42.0]]]
        >>> patches.unfold(x).tolist()
        [[[1.0, 2.0], [2.0, 4.0]]]
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    padding_mode: str = "zeros"

    def read(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Apply a matrix to every patch.

        Args:
            x: ``[batch, c_in, *size]``.
            matrix: ``[n, c_in * prod(kernel)]``, as a convolution's weight with its last dimensions flattened.

        Returns:
            ``[batch, n, *positions]``, in x's memory format.
        """
        weight = matrix.unflatten(1, (-1, *self.kernel))
        convolve = _CONVOLUTIONS[len(self.kernel)]
        if self._is_padded_by_torch:
            padding = [before for before, _ in self.padding]
            return convolve(x, weight, stride=self.stride, padding=padding, dilation=self.dilation)
        return convolve(self._padded(x), weight, stride=self.stride, dilation=self.dilation)

    def map(self, z: Tensor, matrix: Tensor, shift: Tensor | None = None) -> Tensor:
        """Apply a matrix, and add a vector, at every position.

        Args:
            z: ``[batch, m, *positions]``.
            matrix: ``[n, m]``.
            shift: ``[n]``.

        Returns:
            ``[batch, n, *positions]``, in z's memory format.
        """
        dimensions = len(self.kernel)
        return _CONVOLUTIONS[dimensions](z, matrix.reshape(*matrix.shape, *[1] * dimensions), shift)

    def unfold(self, x: Tensor) -> Tensor:
        """The patches themselves, which `read` never makes.

        Args:
            x: ``[batch, c_in, *size]``.

        Returns:
            ``[batch, *positions, c_in * prod(kernel)]``: ``unfold(x) @ matrix.T`` is `read` with the channels last.
        """
        x = self._padded(x)
        for dimension, (size, step, gap) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), 2):
            x = x.unfold(dimension, gap * (size - 1) + 1, step)[..., ::gap]
        return x.movedim(1, len(self.kernel) + 1).flatten(len(self.kernel) + 1)

    @property
    def _is_padded_by_torch(self) -> bool:
        return self.padding_mode == "zeros" and all(before == after for before, after in self.padding)

    def _padded(self, x: Tensor) -> Tensor:
        """The input with its border; `torch.nn.functional.pad` counts dimensions from the last."""
        sides = [side for pair in reversed(self.padding) for side in pair]
        if not any(sides):
            return x
        return F.pad(x, sides, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
