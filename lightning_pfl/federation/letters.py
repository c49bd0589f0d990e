"""What travels between server and clients as bytes: shared tensors, what a client sends, what it receives.

Start at `write_shared` and `read_shared`. A letter names the layout of its vector by a digest where the other side
knows it, and spells it out where it does not. Reading runs no code, takes no more memory than the bytes call for, and
raises `ValueError` at whatever is not a letter of the run's format.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, final

import numpy
import torch
from torch import Tensor

from lightning_pfl.functional.wire import DenseFormat, LargestChanges, WireFormat
from lightning_pfl.types import FlatTensors, Layout, Letter, Personalized, PersonalizedLetter, SharedTensors

__all__ = [
    "Terms",
    "layouts_of",
    "read_keys",
    "read_personalized",
    "read_shared",
    "read_sketch",
    "write_keys",
    "write_personalized",
    "write_shared",
    "write_sketch",
]

_MAGIC = b"PFL1"
_HEAD = struct.Struct("<4sB8sII")  # magic, kind, digest of the layout, checksum of the copy, length of the layout
_WHOLE, _CHANGES = 0, 1
_LARGEST_LAYOUT = 2**24  # bytes, spelled out
_LARGEST_SIDE = 2**40


@final
@dataclass(frozen=True)
class Terms:
    """How a client and the server write to each other in one turn.

    Attributes:
        wire: the run's format.
        known: digests of layouts that the server knows from this client.
        has_copy: whether it has a copy of what the client has sent, from which changes can be told.
    """

    wire: WireFormat
    known: frozenset[bytes] = field(default=frozenset())
    has_copy: bool = False


def write_shared(
    shared: SharedTensors, wire: WireFormat, *, known: Collection[bytes], copy: SharedTensors | None = None
) -> Letter:
    """Write shared tensors.

    Args:
        shared: what to write.
        wire: the run's format.
        known: digests of layouts that the reader knows, from `layouts_of`.
        copy: what the reader has of them, in the same layouts; used where the format sends changes. None: nothing.

    Example:
        >>> import torch
        >>> from lightning_pfl.functional.wire import Bfloat16
        >>> shared = SharedTensors(FlatTensors.pack({"P": torch.ones(3)}))
        >>> layouts = layouts_of(shared)
        >>> letter = write_shared(shared, Bfloat16(), known=layouts)
        >>> letter.nbytes, read_shared(letter, Bfloat16(), layouts=layouts).common.vector
        (27, tensor([1., 1., 1.]))
    """
    copies = (None, None) if copy is None else (copy.common, copy.same_architecture)
    flats = (shared.common, shared.same_architecture)
    return Letter(*(_write(flat, wire, known, base) for flat, base in zip(flats, copies, strict=True)))


def read_shared(
    letter: Letter, wire: WireFormat, *, layouts: Mapping[bytes, Layout], copy: SharedTensors | None = None
) -> SharedTensors:
    """Read shared tensors.

    Args:
        letter: from `write_shared`, or from who knows where.
        wire: the run's format.
        layouts: that the reader knows, by digest.
        copy: as in `write_shared`.

    Raises:
        ValueError: it is no letter of this format, names a layout that is not known, or tells changes of another copy.
    """
    copies = (None, None) if copy is None else (copy.common, copy.same_architecture)
    pieces = (letter.common, letter.same_architecture)
    return SharedTensors(*(_read(data, wire, layouts, base) for data, base in zip(pieces, copies, strict=True)))


def write_personalized(personalized: Personalized, wire: WireFormat, *, known: Collection[bytes]) -> PersonalizedLetter:
    """Write what a client receives; ``known`` as in `write_shared`."""
    written: dict[int, Letter] = {}
    sent: list[tuple[SharedTensors, Letter]] = []

    def letter(shared: SharedTensors | None) -> Letter | None:
        if shared is None:
            return None
        if id(shared) not in written:
            new = write_shared(shared, wire.dense, known=known)
            alike = (
                one for _, one in sent if (one.common, one.same_architecture) == (new.common, new.same_architecture)
            )
            written[id(shared)] = next(alike, new)
            sent.append((shared, written[id(shared)]))
        return written[id(shared)]

    return PersonalizedLetter(letter(personalized.frozen), letter(personalized.start))


def read_personalized(letter: PersonalizedLetter, wire: WireFormat, *, layouts: Mapping[bytes, Layout]) -> Personalized:
    """Read what a client receives; see `read_shared`."""
    frozen = None if letter.frozen is None else read_shared(letter.frozen, wire.dense, layouts=layouts)
    if letter.start is letter.frozen:
        return Personalized(frozen, frozen)
    start = None if letter.start is None else read_shared(letter.start, wire.dense, layouts=layouts)
    return Personalized(frozen, start)


def write_sketch(sketch: Tensor, wire: WireFormat) -> bytes:
    """Write a sketch ``[k]``, after its length."""
    return struct.pack("<I", sketch.numel()) + wire.dense.encode(sketch, [sketch.numel()])


def read_sketch(data: bytes, wire: WireFormat) -> Tensor:
    """Undo `write_sketch`.

    Raises:
        ValueError: the bytes are none.
    """
    if len(data) < 4:
        raise ValueError(f"A sketch begins with its length in four bytes, but there are {len(data)}.")
    return wire.dense.decode(data[4:], [struct.unpack("<I", data[:4])[0]])


def write_keys(keys: Tensor) -> bytes:
    """Write keys ``[m, w]`` after their sides, in float32 whatever the format: counts bear no rounding.

    Example:
        >>> import torch
        >>> len(write_keys(torch.ones(2, 3))), read_keys(write_keys(torch.ones(1, 3)))
        (32, tensor([[1., 1., 1.]]))
    """
    return struct.pack("<II", *keys.shape) + keys.contiguous().numpy().astype("<f4").tobytes()


def read_keys(data: bytes) -> Tensor:
    """Undo `write_keys`.

    Raises:
        ValueError: the bytes are none.
    """
    sides = struct.unpack("<II", data[:8]) if len(data) >= 8 else (0, 0)
    if len(data) != 8 + 4 * sides[0] * sides[1] or len(data) == 8:
        raise ValueError(f"Keys are rows of numbers of four bytes after their two sides, but here are {len(data)}.")
    return torch.from_numpy(numpy.frombuffer(data, "<f4", offset=8).astype("f4").reshape(sides))


def layouts_of(shared: SharedTensors) -> dict[bytes, Layout]:
    """The layouts of shared tensors, by what letters call them."""
    return {_digest(flat.layout): flat.layout for flat in (shared.common, shared.same_architecture)}


def _write(flat: FlatTensors, wire: WireFormat, known: Collection[bytes], base: FlatTensors | None) -> bytes:
    if not flat.layout.names:
        return b""
    digest, sizes = _digest(flat.layout), _sizes(flat.layout)
    if isinstance(wire, LargestChanges) and base is not None and base.layout == flat.layout:
        head = _HEAD.pack(_MAGIC, _CHANGES, digest, _checksum(base), 0)
        return head + wire.encode(flat.vector - base.vector)
    spelled = b"" if digest in known else zlib.compress(_spelled(flat.layout), 9)
    return _HEAD.pack(_MAGIC, _WHOLE, digest, 0, len(spelled)) + spelled + wire.dense.encode(flat.vector, sizes)


def _read(data: bytes, wire: WireFormat, layouts: Mapping[bytes, Layout], base: FlatTensors | None) -> FlatTensors:
    if not data:
        return FlatTensors.empty()
    if len(data) < _HEAD.size:
        raise ValueError(f"A letter begins with {_HEAD.size} bytes that say what it is, but this one has {len(data)}.")
    magic, kind, digest, checksum, length = _HEAD.unpack_from(data)
    if magic != _MAGIC or kind not in (_WHOLE, _CHANGES):
        raise ValueError(f"These bytes are no letter of this release: they begin with {data[:5]!r}.")
    spelled, payload = data[_HEAD.size : _HEAD.size + length], data[_HEAD.size + length :]
    if kind == _CHANGES:
        return _changed(payload, wire, digest, checksum, base)
    layout = _layout(spelled) if length else layouts.get(digest)
    if layout is None:
        raise ValueError("The letter names a layout of tensors that is not known here, and does not spell it out.")
    dense: DenseFormat = wire.dense
    return FlatTensors(layout, dense.decode(payload, _sizes(layout)))


def _changed(payload: bytes, wire: WireFormat, digest: bytes, checksum: int, base: FlatTensors | None) -> FlatTensors:
    if not isinstance(wire, LargestChanges):
        raise ValueError(f"The letter tells changes, but this run sends everything, as {wire!r}.")
    if base is None or digest != _digest(base.layout) or checksum != _checksum(base):
        raise ValueError("The letter tells changes of a copy that is not the one kept here.")
    return FlatTensors(base.layout, base.vector + wire.decode(payload, base.layout.numel))


def _sizes(layout: Layout) -> list[int]:
    return [stop - start for start, stop in layout.spans.values()]


def _checksum(flat: FlatTensors) -> int:
    return zlib.crc32(flat.vector.numpy().tobytes())


@lru_cache(maxsize=1024)
def _digest(layout: Layout) -> bytes:
    return hashlib.sha256(_spelled(layout)).digest()[:8]


def _spelled(layout: Layout) -> bytes:
    return json.dumps([list(layout.names), [list(shape) for shape in layout.shapes]]).encode()


def _layout(spelled: bytes) -> Layout:
    """A layout that is spelled out; whatever is wrong with it is a `ValueError`."""
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(spelled, _LARGEST_LAYOUT)
        if unpacker.unconsumed_tail:
            raise ValueError(f"it is longer than {_LARGEST_LAYOUT} bytes")
        names, shapes = json.loads(text)
        _require_layout(names, shapes)
        return Layout(tuple(names), tuple(tuple(shape) for shape in shapes))
    except (zlib.error, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"The letter's layout cannot be read: {error!s:.200}.") from None


def _require_layout(names: Any, shapes: Any) -> None:
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    sides = isinstance(shapes, list) and all(
        isinstance(shape, list) and all(type(side) is int and 0 <= side < _LARGEST_SIDE for side in shape)
        for shape in shapes
    )
    if not texts or not sides:
        raise ValueError("it must hold names and shapes")
