"""Pickle with the tensors set aside: small ones in one block of bytes, big ones in a file that can be mapped.

Start at `dump` and `load`. Everything that pickle would copy byte by byte (CPU tensors, numpy arrays) is stored next to
the pickle, once per storage: ties and views come back as ties and views, a `Parameter` as a `Parameter`. What
cloudpickle can do (functions defined in a notebook, classes of the main script) works too.
"""

from __future__ import annotations

import io
import mmap
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import cloudpickle  # type: ignore[import-untyped, unused-ignore]
import torch
from torch import Tensor

from lightning_pfl.federation.tensor_file import TensorFile

__all__ = ["LARGE", "Pickled", "dump", "explain", "load"]

LARGE = 64 * 1024
"""From how many bytes on a storage goes to the file."""

_Place = tuple[str, int, int]  # "block" or "file", first byte, number of bytes


@dataclass(frozen=True, eq=False)
class Pickled:
    """An object as bytes.

    Attributes:
        pickle: the object without its tensors.
        block: the small storages, one after another.
        buffers: where big numpy arrays lie in the file: first byte, number of bytes.
        needs_file: whether anything lies in the file.
    """

    pickle: bytes
    block: bytes
    buffers: tuple[tuple[int, int], ...] = ()
    needs_file: bool = False

    @property
    def nbytes(self) -> int:
        """What travels, without the file."""
        return len(self.pickle) + len(self.block)


def dump(obj: Any, file: TensorFile | None = None) -> Pickled:
    """Pickle an object.

    Args:
        obj: anything that cloudpickle can pickle.
        file: where tensors and numpy arrays of `LARGE` bytes and more go; None: they stay with the others.

    Raises:
        TypeError: something in it cannot be pickled; `explain` says what.

    Example:
        >>> import torch
        >>> weight = torch.arange(6.0).reshape(2, 3)
        >>> again, column = load(dump((weight, weight[:, 1])))
        >>> column += 10
        >>> again
        tensor([[ 0., 11.,  2.],
                [ 3., 14.,  5.]])
    """
    block, buffers, taken = bytearray(), [], set[int]()

    def keep(data: memoryview) -> _Place:
        if file is not None and data.nbytes >= LARGE:
            start = file.add(data, taken=taken)
            taken.add(start)
            return ("file", start, data.nbytes)
        start = len(block)
        block.extend(data)
        return ("block", start, data.nbytes)

    def keep_array(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < LARGE:
            return True  # stays in the pickle
        buffers.append(keep(raw)[1:])
        return False

    stream = io.BytesIO()
    _Pickler(stream, keep, None if file is None else keep_array).dump(obj)
    return Pickled(stream.getvalue(), bytes(block), tuple(buffers), bool(taken))


def load(pickled: Pickled, mapping: mmap.mmap | None = None) -> Any:
    """Unpickle an object, with tensors of its own.

    Args:
        pickled: from `dump`.
        mapping: a fresh mapping of the file that `dump` wrote to; its pages become the tensors' memory.
    """
    arrays = [memoryview(mapping)[start : start + count] for start, count in pickled.buffers] if mapping else []
    return _Unpickler(io.BytesIO(pickled.pickle), bytearray(pickled.block), mapping, arrays).load()


def explain(obj: Any, name: str) -> str | None:
    """Find what in an object cannot be pickled: the path to it and the reason, as text; None if all of it can.

    Example:
        >>> import threading
        >>> explain({"model": {"lock": threading.Lock()}}, "job")
        "`job['model']['lock']`: cannot pickle '_thread.lock' object"
    """
    if (reason := _reason(obj)) is None:
        return None
    for _ in range(8):
        for step, child in _children(obj).items():
            if (found := _reason(child)) is not None:
                obj, name, reason = child, name + step, found
                break
        else:
            break
    return f"`{name}`: {reason}"


def _reason(obj: Any) -> str | None:
    try:
        _Pickler(io.BytesIO(), lambda data: ("block", 0, 0), None).dump(obj)
    except Exception as error:
        return str(error)
    return None


def _children(obj: Any) -> dict[str, Any]:
    if isinstance(obj, Mapping):
        return {f"[{key!r}]": value for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return {f"[{index}]": value for index, value in enumerate(obj)}
    return {f".{key}": value for key, value in getattr(obj, "__dict__", {}).items()}


@final
class _Aside:
    __slots__ = ("place",)

    def __init__(self, place: _Place) -> None:
        self.place = place


@final
class _Pickler(cloudpickle.CloudPickler):
    def __init__(
        self,
        stream: io.BytesIO,
        keep: Callable[[memoryview], _Place],
        keep_array: Callable[[pickle.PickleBuffer], bool] | None,
    ) -> None:
        super().__init__(stream, protocol=5, buffer_callback=keep_array)
        self._keep = keep
        self._seen: dict[tuple[int, int], _Aside] = {}
        self._alive: list[torch.UntypedStorage] = []  # an address identifies a storage only while the storage lives

    def persistent_id(self, obj: Any) -> _Place | None:
        return obj.place if type(obj) is _Aside else None

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not Tensor or not _is_plain(obj):
            return super().reducer_override(obj)
        ref = self._set_aside(obj.untyped_storage())
        values = (ref, obj.dtype, obj.storage_offset(), tuple(obj.shape), obj.stride(), obj.requires_grad)
        if attributes := dict(vars(obj)):
            return _rebuild, values, attributes, None, None, _set_attributes
        return _rebuild, values

    def _set_aside(self, storage: torch.UntypedStorage) -> _Aside:
        if storage.nbytes() == 0:
            return _Aside(("block", 0, 0))
        key = (storage.data_ptr(), storage.nbytes())
        if key not in self._seen:
            data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            self._seen[key] = _Aside(self._keep(data.data))
            self._alive.append(storage)
        return self._seen[key]


@final
class _Unpickler(pickle.Unpickler):
    def __init__(
        self, stream: io.BytesIO, block: bytearray, mapping: mmap.mmap | None, arrays: list[memoryview]
    ) -> None:
        super().__init__(stream, buffers=arrays)
        self._block = block
        self._mapping = mapping
        self._storages: dict[_Place, torch.UntypedStorage] = {}

    def persistent_load(self, place: Any) -> torch.UntypedStorage:
        if place not in self._storages:
            self._storages[place] = self._storage(*place)
        return self._storages[place] if place[2] else torch.UntypedStorage(0)  # empty ones may grow, each by itself

    def _storage(self, where: str, start: int, nbytes: int) -> torch.UntypedStorage:
        if nbytes == 0:
            return torch.UntypedStorage(0)
        if where == "block":
            return (
                torch.frombuffer(self._block, dtype=torch.uint8, count=nbytes, offset=start).clone().untyped_storage()
            )
        assert self._mapping is not None, "this pickle refers to a tensor file, but was loaded without one"
        return torch.frombuffer(self._mapping, dtype=torch.uint8, count=nbytes, offset=start).untyped_storage()


def _is_plain(tensor: Tensor) -> bool:
    """Whether a storage, a dtype, an offset, sizes and strides are all there is to a tensor."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
        and not tensor.is_conj()
        and not tensor.is_neg()
        and tensor._backward_hooks is None  # torch's own reduction warns that hooks are lost
    )


def _rebuild(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
) -> Tensor:
    tensor = torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
    return tensor.requires_grad_(requires_grad)


def _set_attributes(tensor: Tensor, attributes: dict[str, Any]) -> None:
    vars(tensor).update(attributes)
