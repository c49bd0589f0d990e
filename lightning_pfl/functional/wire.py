r"""How numbers become bytes when clients and server send them to each other, and numbers again.

Start at `WireFormat`. A `DenseFormat` writes whole vectors (`Float32`, `Bfloat16`, `Int8`); `LargestChanges` writes
only what has changed most since the receiver's last copy. Both sides decode the same bytes by the same arithmetic, so
that they agree on every bit of what was sent, rounded as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import final

import numpy as np
import torch
from torch import Tensor

__all__ = ["Bfloat16", "DenseFormat", "Float32", "Int8", "LargestChanges", "WireFormat"]


class WireFormat(ABC):
    """How what clients and server send each other is written. Leaves are frozen dataclasses."""

    @property
    @abstractmethod
    def dense(self) -> DenseFormat:
        """For what is sent whole: what clients receive, sketches, and what a client sends first."""


class DenseFormat(WireFormat):
    """Writes every number of a vector."""

    @property
    def dense(self) -> DenseFormat:
        """Itself."""
        return self

    @abstractmethod
    def nbytes(self, sizes: Sequence[int]) -> int:
        """How many bytes a vector takes.

        Args:
            sizes: numbers in each of the tensors that lie one after another in it.
        """

    @abstractmethod
    def encode(self, vector: Tensor, sizes: Sequence[int]) -> bytes:
        """Write a vector.

        Args:
            vector: float32, shape ``[sum(sizes)]``, on the CPU. What is not finite arrives as something that is not.
            sizes: as in `nbytes`.
        """

    @abstractmethod
    def _decode(self, data: bytes, sizes: Sequence[int]) -> Tensor:
        """Undo `encode`; there are `nbytes` bytes."""

    def decode(self, data: bytes, sizes: Sequence[int]) -> Tensor:
        """Read a vector.

        Returns:
            float32, shape ``[sum(sizes)]``, in memory of its own.

        Raises:
            ValueError: another number of bytes than such a vector takes.
        """
        if len(data) != self.nbytes(sizes):
            raise ValueError(
                f"{sum(sizes)} numbers as {self!r} take {self.nbytes(sizes)} bytes, but there are {len(data)}."
            )
        return self._decode(data, sizes) if sum(sizes) else torch.zeros(0)


@final
@dataclass(frozen=True)
class Float32(DenseFormat):
    """Four bytes per number, nothing rounded.

    Example:
        >>> Float32().decode(Float32().encode(torch.tensor([0.1]), [1]), [1])
        tensor([0.1000])
    """

    def nbytes(self, sizes: Sequence[int]) -> int:
        """Four each."""
        return 4 * sum(sizes)

    def encode(self, vector: Tensor, sizes: Sequence[int]) -> bytes:
        """As it lies in memory."""
        return _bytes(vector)

    def _decode(self, data: bytes, sizes: Sequence[int]) -> Tensor:
        return _tensor(data, torch.float32)


@final
@dataclass(frozen=True)
class Bfloat16(DenseFormat):
    """Two bytes per number, which keep 8 binary digits: each number is off by at most 1/256 of itself.

    Example:
        >>> Bfloat16().decode(Bfloat16().encode(torch.tensor([0.1, -3.0]), [2]), [2])
        tensor([ 0.1001, -3.0000])
    """

    def nbytes(self, sizes: Sequence[int]) -> int:
        """Two each."""
        return 2 * sum(sizes)

    def encode(self, vector: Tensor, sizes: Sequence[int]) -> bytes:
        """Rounded to the nearest."""
        return _bytes(vector.bfloat16())

    def _decode(self, data: bytes, sizes: Sequence[int]) -> Tensor:
        return _tensor(data, torch.bfloat16).float()


@final
@dataclass(frozen=True)
class Int8(DenseFormat):
    """One byte per number and a scale per block: a number is off by at most 1/254 of the largest in its block.

    Args:
        block: how many numbers share a scale (four bytes). None: each tensor has its own, however large it is.

    Raises:
        ValueError: a block below 1.

    Example:
        >>> vector = torch.tensor([1.0, -0.5, 0.003, 0.002])
        >>> Int8(block=2).decode(Int8(block=2).encode(vector, [4]), [4])
        tensor([ 1.0000, -0.5039,  0.0030,  0.0020])
        >>> Int8(block=None).nbytes([256, 16])
        280
    """

    block: int | None = 128

    def __post_init__(self) -> None:
        if self.block is not None and self.block < 1:
            raise ValueError(f"`block` counts numbers that share a scale, at least 1, but is {self.block}.")

    def nbytes(self, sizes: Sequence[int]) -> int:
        """One each, and four per scale."""
        numbers = sum(sizes)
        scales = sum(size > 0 for size in sizes) if self.block is None else -(-numbers // self.block)
        return numbers + 4 * scales

    def encode(self, vector: Tensor, sizes: Sequence[int]) -> bytes:
        """Scales, then numbers rounded to the nearest multiple of theirs."""
        parts = self._parts(sizes)
        if not parts:
            return b""
        scales = self._largest(vector.abs(), parts) / 127
        each = _spread(scales.where(scales > 0, 1.0), parts)
        codes = (vector / each).nan_to_num(nan=0.0).round().clamp(-127, 127).to(torch.int8)
        return _bytes(scales) + _bytes(codes)

    def _decode(self, data: bytes, sizes: Sequence[int]) -> Tensor:
        parts = self._parts(sizes)
        split = 4 * len(parts)
        return _tensor(data[split:], torch.int8).float() * _spread(_tensor(data[:split], torch.float32), parts)

    def _largest(self, sizes: Tensor, parts: Sequence[int]) -> Tensor:
        """The largest of each part."""
        if self.block is None:
            return torch.stack([part.amax() for part in sizes.split(list(parts))])
        padded = torch.nn.functional.pad(sizes, (0, len(parts) * self.block - sizes.numel()))
        return padded.view(len(parts), self.block).amax(1)

    def _parts(self, sizes: Sequence[int]) -> list[int]:
        """How many numbers share each scale."""
        if self.block is None:
            return [size for size in sizes if size]
        full, rest = divmod(sum(sizes), self.block)
        return [self.block] * full + ([rest] if rest else [])


@final
@dataclass(frozen=True)
class LargestChanges(WireFormat):
    r"""Clients send only the numbers that have changed most since the server's copy; the others wait.

    What a client holds back it adds to its next change (error feedback), so that nothing is lost for good, only late.
    Its first update is sent whole, and so are sketches and what clients receive, in the format of `values`: a mixture
    of others changes everywhere.

    Args:
        fraction: of the numbers that is sent, above 0 to 1; at least one number is.
        values: how those are written. Their places take two bytes each where a vector has at most 65,536 numbers, else
            four.

    Raises:
        ValueError: a fraction out of range.

    Source:
        Top-k with error feedback: Stich, Cordonnier and Jaggi, NeurIPS 2018, arXiv:1809.07599, Algorithm 1. There
        gradients are sent; here it is the step from the copy that both sides have to what was trained.

    Example:
        >>> wire = LargestChanges(0.5, values=Float32())
        >>> wire.decode(wire.encode(torch.tensor([0.1, -3.0, 0.2, 0.5])), 4)
        tensor([ 0.0000, -3.0000,  0.0000,  0.5000])
    """

    fraction: float
    values: DenseFormat = field(default=Bfloat16(), kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.fraction, (int, float)) or not 0 < self.fraction <= 1:
            raise ValueError(
                f"`fraction` of the numbers to send must be above 0 and at most 1, but is {self.fraction}."
            )

    @property
    def dense(self) -> DenseFormat:
        """The format of the values."""
        return self.values

    def kept(self, numel: int) -> int:
        """How many of so many numbers are sent."""
        return min(numel, max(1, ceil(self.fraction * numel - 1e-9)))

    def nbytes(self, numel: int) -> int:
        """How many bytes the changes of a vector of so many numbers take."""
        count = self.kept(numel)
        return count * np.dtype(_places(numel)).itemsize + self.values.nbytes([count])

    def encode(self, change: Tensor) -> bytes:
        """Write the largest numbers of a vector; of equal ones the first.

        Args:
            change: float32, shape ``[n]``, on the CPU. What is not finite counts as large, so that it is sent and seen.
        """
        count = self.kept(change.numel())
        if not count:
            return b""
        sizes = change.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        least = sizes.kthvalue(change.numel() - count + 1).values
        larger = (sizes > least).nonzero()[:, 0]
        equal = (sizes == least).nonzero()[: count - larger.numel(), 0]
        places = torch.cat([larger, equal]).sort().values
        return places.numpy().astype(_places(change.numel())).tobytes() + self.values.encode(change[places], [count])

    def decode(self, data: bytes, numel: int) -> Tensor:
        """Read a vector, zero where nothing was sent.

        Args:
            data: from `encode`.
            numel: how many numbers the vector has.

        Returns:
            float32, shape ``[numel]``.

        Raises:
            ValueError: another number of bytes than such a vector takes, or places that are not in it.
        """
        if len(data) != self.nbytes(numel):
            raise ValueError(
                f"The largest changes of {numel} numbers as {self!r} take {self.nbytes(numel)} bytes, but there are "
                f"{len(data)}."
            )
        vector, count = torch.zeros(numel), self.kept(numel)
        if not count:
            return vector
        split = count * np.dtype(_places(numel)).itemsize
        places = torch.from_numpy(np.frombuffer(data[:split], dtype=_places(numel)).astype(np.int64))
        if int(places[-1]) >= numel or bool((places.diff() <= 0).any()):
            raise ValueError(f"The places of {count} changes must rise and lie below {numel}, but do not.")
        vector[places] = self.values.decode(data[split:], [count])
        return vector


def _places(numel: int) -> str:
    """The type that says where in a vector a number stands."""
    return "<u2" if numel <= 2**16 else "<u4"


def _spread(scales: Tensor, parts: Sequence[int]) -> Tensor:
    return scales.repeat_interleave(torch.tensor(parts))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)
