"""What can be wrong with one update, in itself or against what the server knows of its client.

Start at `fault_in` and `unexpected_in`, which say it in words, and at `sizes_of`, which measures what only the other
clients' updates can tell to be too large. What follows from a fault is decided in `guard`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_pfl.aggregation.mixable import some
from lightning_pfl.functional.routing import Keys
from lightning_pfl.types import ClientUpdate, FlatTensors, Layout, SharedTensors

__all__ = [
    "Expectation",
    "fault_in",
    "known_shapes",
    "sizes_of",
    "unexpected_in",
    "usual_keys_width",
    "usual_sketch_size",
]

_PARTS = ("common", "same_architecture")


@final
@dataclass(frozen=True, eq=False)
class Expectation:
    """What the server knows of a client before its update comes; None: not known.

    Attributes:
        round: in which the client was asked.
        architecture: as in `ClientUpdate`; differs for another base model.
        layouts: names and shapes that the client shares, ``common`` and ``same_architecture``; differ for another rank.
        start: values from which the client set out; how far it went from there is judged. None: from zero, where P and
            Q begin.
        sketch_size: numbers in a sketch.
        keys_width: numbers in a row of keys.
        counted: whether `num_examples` is the server's own knowledge and no claim of the client.
    """

    round: int | None = None
    architecture: str | None = None
    layouts: tuple[Layout, Layout] | None = None
    start: SharedTensors | None = None
    sketch_size: int | None = None
    keys_width: int | None = None
    counted: bool = False


def fault_in(update: ClientUpdate) -> str | None:
    """What is wrong with an update in itself; None when nothing is."""
    if isinstance(update.num_examples, bool) or not isinstance(update.num_examples, int) or update.num_examples <= 0:
        return f"`num_examples` must be a positive whole number, but is {update.num_examples!r}"
    for part, flat in _parts(update.shared):
        if flat.vector.shape != (flat.layout.numel,) or flat.vector.dtype != torch.float32:  # it came as bytes
            return (
                f"`{part}` must be float32 of shape ({flat.layout.numel},) as its layout says, "
                f"but is {flat.vector.dtype} of shape {tuple(flat.vector.shape)}"
            )
        if names := _not_finite(flat):
            return f"{some(names)} in `{part}` must be finite, but hold NaN or infinity"
    sketch = update.sketch
    if sketch is not None and (sketch.ndim != 1 or sketch.dtype != torch.float32 or not sketch.numel()):
        return f"its sketch must be a float32 vector, but is {sketch.dtype} of shape {tuple(sketch.shape)}"
    if sketch is not None and not bool(torch.isfinite(sketch).all()):
        return "its sketch must be finite, but holds NaN or infinity"
    if update.keys is not None and (fault := Keys.fault_in(update.keys)) is not None:
        return f"its keys {fault}"
    return None


def unexpected_in(
    update: ClientUpdate,
    expected: Expectation,
    shapes: Mapping[str, tuple[int, ...]],
    sketch_size: int | None,
    keys_width: int | None = None,
) -> str | None:
    """What differs from what was asked for; None when nothing does."""
    if expected.round is not None and update.round != expected.round:
        return f"it must be of round {expected.round}, but says {update.round}"
    if expected.architecture is not None and update.architecture != expected.architecture:
        return (
            f"its architecture or base model must be `{expected.architecture}`, but is `{update.architecture}`. Did "
            "its model change?"
        )
    mine = [flat.layout for _, flat in _parts(update.shared)]
    for part, layout, wanted in zip(_PARTS, mine, expected.layouts or (None, None), strict=True):
        if wanted is not None and layout != wanted:
            return f"`{part}` must hold what the client shares: {_difference(layout, wanted)}"
    for name, shape in zip(mine[0].names, mine[0].shapes, strict=True):
        if shapes.get(name, shape) != shape:
            return f"`{name}` must have the shape {shapes[name]} that other clients' have, but has {shape}"
    if update.sketch is not None and sketch_size is not None and update.sketch.numel() != sketch_size:
        return (
            f"its sketch must have {sketch_size} numbers, but has {update.sketch.numel()}. Give all clients one probe"
        )
    if update.keys is not None and keys_width is not None and update.keys.shape[1] != keys_width:
        return (
            f"its keys must have {keys_width} numbers in a row, but have {update.keys.shape[1]}. Give all clients one "
            "reader"
        )
    return None


def sizes_of(update: ClientUpdate, expected: Expectation) -> dict[str, float]:
    """How far the client went from where it started, per part, and how long its sketch is."""
    sizes = {}
    for part, flat in _parts(update.shared):
        if flat.layout.numel:
            step = flat.vector
            if expected.start is not None:
                step = _minus(flat, getattr(expected.start, part))
            norm = torch.linalg.vector_norm(step, dtype=torch.float64)  # a copy in float64 would take ten times as long
            sizes[part] = float(norm) / math.sqrt(step.numel())
    if update.sketch is not None:
        sizes["sketch"] = float(torch.linalg.vector_norm(update.sketch.double()))
    return sizes


def known_shapes(expectations: Collection[Expectation]) -> dict[str, tuple[int, ...]]:
    """Of tensors for all clients, whoever holds them."""
    layouts = {item.layouts[0] for item in expectations if item.layouts is not None}
    return {name: shape for layout in layouts for name, shape in zip(layout.names, layout.shapes, strict=True)}


def usual_sketch_size(updates: Sequence[ClientUpdate], expectations: Collection[Expectation]) -> int | None:
    """What the server remembers, else what most clients send."""
    known = {item.sketch_size for item in expectations if item.sketch_size is not None}
    return _usual(known, [item.sketch.numel() for item in updates if isinstance(item.sketch, Tensor)])


def usual_keys_width(updates: Sequence[ClientUpdate], expectations: Collection[Expectation]) -> int | None:
    """What the server remembers, else what most clients send."""
    known = {item.keys_width for item in expectations if item.keys_width is not None}
    return _usual(known, [item.keys.shape[-1] for item in updates if isinstance(item.keys, Tensor) and item.keys.ndim])


def _usual(known: Collection[int], sent: Sequence[int]) -> int | None:
    if known:
        return max(known)
    sizes = Counter(sent)
    return max(sizes, key=lambda size: (sizes[size], size)) if sizes else None


def _minus(flat: FlatTensors, start: FlatTensors) -> Tensor:
    """What a client has added to where it started, of names that it started from."""
    if flat.layout == start.layout:
        return flat.vector - start.vector
    step, known = flat.vector.clone(), start.unpack()
    for name, (begin, end) in flat.layout.spans.items():
        if name in known and known[name].numel() == end - begin:
            step[begin:end] -= known[name].reshape(-1)
    return step


def _not_finite(flat: FlatTensors) -> list[str]:
    if math.isfinite(float(flat.vector.sum())):  # NaN and infinity never leave a sum again
        return []
    return [name for name, tensor in flat.unpack().items() if not bool(torch.isfinite(tensor).all())]


def _parts(shared: SharedTensors) -> list[tuple[str, FlatTensors]]:
    return [(name, getattr(shared, name)) for name in _PARTS]


def _difference(layout: Layout, wanted: Layout) -> str:
    mine = dict(zip(layout.names, layout.shapes, strict=True))
    theirs = dict(zip(wanted.names, wanted.shapes, strict=True))
    differing = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if not differing:
        return "its tensors come in another order"
    name = differing[0]
    return f"{some(differing)} differ ({mine.get(name, 'absent')} instead of {theirs.get(name, 'absent')})"
