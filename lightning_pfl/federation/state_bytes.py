"""A client's checkpoint as bytes that run no code when they are loaded, a tenth of the time that ``torch.save`` takes.

A pickle that may refer to almost nothing (plain containers need no name at all), with the tensors' bytes behind it.
What ``torch.load(weights_only=True)`` refuses is refused here too.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict, defaultdict
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

__all__ = ["pack", "unpack"]

_MAGIC = b"lightning-pfl state 1\n"
_PLAIN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
}


def pack(state: Any, *, check: bool = False) -> bytes:
    """Nested containers of tensors, numbers and strings as bytes.

    Args:
        state: what to pack; tensors may lie on any device.
        check: whether to try if it can be unpacked, which costs as much again.

    Raises:
        TypeError: it holds other objects; the message says where.

    Example:
        >>> unpack(pack({"step": 3, "weights": torch.ones(2)}))
        {'step': 3, 'weights': tensor([1., 1.])}
    """
    tensors: list[Tensor] = []
    stream = io.BytesIO()
    try:
        _Pickler(stream, tensors).dump(state)
    except Exception as error:
        raise TypeError(_unfit(state)) from error
    head = stream.getvalue()
    data = (tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in tensors)
    packed = b"".join([_MAGIC, len(head).to_bytes(8, "little"), head, *data])  # the only copy
    if check:
        try:
            unpack(packed)
        except TypeError as error:
            raise TypeError(_unfit(state)) from error
    return packed


def unpack(packed: bytes) -> Any:
    """What `pack` packed, with tensors of its own on the CPU.

    Raises:
        TypeError: the bytes refer to objects other than tensors, numbers, strings and containers.
        ValueError: they are not from `pack`.
    """
    if not packed.startswith(_MAGIC):
        raise ValueError("These bytes are no client's state: they do not start as one does.")
    start = len(_MAGIC) + 8
    end = start + int.from_bytes(packed[len(_MAGIC) : start], "little")
    try:
        return _Unpickler(io.BytesIO(packed[start:end]), memoryview(packed)[end:]).load()
    except _ForeignObject:
        raise
    except Exception as error:  # pickle raises whatever damaged bytes make of it
        raise ValueError(
            f"These bytes are no client's state: they are damaged ({type(error).__name__}: {error})."
        ) from None


class _ForeignObject(TypeError):
    """The bytes name something that might run code."""


@final
class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(stream, protocol=5)
        self._tensors = tensors
        self._position = 0
        self._places: dict[int, tuple[Any, ...]] = {}

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._places:
            tensor = obj.detach()
            if tensor.layout is not torch.strided or tensor.is_quantized:
                raise TypeError(f"a tensor of layout {tensor.layout}")
            tensor = tensor.cpu().contiguous().resolve_conj().resolve_neg()
            self._tensors.append(tensor)
            dtype = str(tensor.dtype).removeprefix("torch.")
            self._places[id(obj)] = (dtype, tuple(tensor.shape), self._position, tensor.nbytes)
            self._position += tensor.nbytes
        return self._places[id(obj)]


@final
class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, data: memoryview) -> None:
        super().__init__(stream)
        self._data = data

    def persistent_load(self, place: Any) -> Tensor:
        name, shape, start, nbytes = place
        dtype = getattr(torch, name)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"`{name}` is no dtype")
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        there = np.frombuffer(self._data, dtype=np.uint8, count=nbytes, offset=start)  # an error if it is not
        flat = torch.empty(nbytes, dtype=torch.uint8)  # memory of torch's own, aligned as always
        flat.numpy()[:] = there
        return flat.view(dtype).view(shape)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        for allowed in torch.serialization.get_safe_globals():
            found, path = (
                allowed if isinstance(allowed, tuple) else (allowed, f"{allowed.__module__}.{allowed.__name__}")
            )
            if path == f"{module}.{name}":
                return found
        raise _ForeignObject(
            f"The state refers to `{module}.{name}`, which is none of tensors, numbers, strings and containers, so it "
            "is not loaded: loading it might run code."
        )


def _unfit(state: Any) -> str:
    path = "checkpoint"
    while isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        bad = next(((key, value) for key, value in items if not _fits(value)), None)
        if bad is None:
            break
        path, state = f"{path}[{bad[0]!r}]", bad[1]
    return (
        "A client's state must consist of tensors, numbers, strings and containers, so that a checkpoint from "
        f"elsewhere cannot run code, but `{path}` is a {type(state).__name__}. Return plain values from "
        "`state_dict` and `on_save_checkpoint`, or allow the type with `torch.serialization.add_safe_globals`."
    )


def _fits(value: Any) -> bool:
    stream: io.BytesIO = io.BytesIO()
    try:
        _Pickler(stream, []).dump(value)
        stream.seek(0)
        _Names(stream).load()
    except Exception:
        return False
    return True


class _Names(pickle.Unpickler):
    """Looks at names only."""

    def persistent_load(self, place: Any) -> None:
        return None

    def find_class(self, module: str, name: str) -> Any:
        return _Unpickler(io.BytesIO(), memoryview(b"")).find_class(module, name)
