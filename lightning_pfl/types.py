"""Frozen dataclasses that cross a boundary between rooms, and between server and clients.

Start at `ClientUpdate` (what a client sends up) and `Personalized` (what the server sends down); both are made of
`SharedTensors`, which are made of `FlatTensors`: one float32 vector with a `Layout` that says what lies where. Where a
wire format is chosen, they travel as an `UpdateLetter` and a `PersonalizedLetter`. Only what stands here travels; a
client's private state never does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Aggregation",
    "Assignment",
    "ClientUpdate",
    "FlatTensors",
    "Layout",
    "Letter",
    "Personalized",
    "PersonalizedLetter",
    "SharedTensors",
    "UpdateLetter",
]


@dataclass(frozen=True)
class Layout:
    """Which named tensors lie in a flat vector, one after another, in which shapes.

    Attributes:
        names: one name per tensor, unique.
        shapes: one shape per name.

    Example:
        >>> layout = Layout(("P", "Q"), ((2, 2), (2,)))
        >>> layout.numel
        6
        >>> layout.spans["Q"]
        (4, 6)
    """

    names: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes):
            raise ValueError(f"A layout needs one shape per name, but has {len(self.names)} and {len(self.shapes)}.")
        if len(set(self.names)) != len(self.names):
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise ValueError(f"Names in a layout must be unique, but {twice} occur more than once.")

    @property
    def numel(self) -> int:
        """How many numbers the vector holds."""
        return sum(prod(shape) for shape in self.shapes)

    @property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Per name, where its numbers begin and end in the vector."""
        spans, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            spans[name] = (start, start + prod(shape))
            start += prod(shape)
        return spans

    @property
    def factors(self) -> dict[str, tuple[str, str]]:
        """Which tensors are the two factors of one product, by the name of the layer that they belong to.

        ``<layer>.A`` of shape ``[r, d_in]`` and ``<layer>.B`` of ``[d_out, r]`` are; what is called so and has other
        shapes, or no partner, is a tensor like any other.

        Example:
            >>> Layout(("0.A", "0.B", "norm"), ((2, 8), (4, 2), (8,))).factors
            {'0': ('0.A', '0.B')}
        """
        shapes = dict(zip(self.names, self.shapes, strict=True))
        found = {}
        for name, shape in shapes.items():
            layer = name.removesuffix(".A")
            partner = shapes.get(f"{layer}.B", ())
            if layer != name and len(shape) == len(partner) == 2 and shape[0] == partner[1]:
                found[layer] = (name, f"{layer}.B")
        return found


@dataclass(frozen=True, eq=False)
class FlatTensors:
    """Named tensors as one flat float32 vector: the form in which they travel.

    Sending many small tensors one by one costs twenty times as much as sending one vector.

    Attributes:
        layout: what lies where.
        vector: float32, shape ``[layout.numel]``, on the CPU.

    Example:
        >>> flat = FlatTensors.pack({"P": torch.eye(2), "Q": torch.zeros(2)})
        >>> flat.vector
        tensor([1., 0., 0., 1., 0., 0.])
        >>> flat.unpack()["P"].shape
        torch.Size([2, 2])
    """

    layout: Layout
    vector: Tensor

    def __post_init__(self) -> None:
        if self.vector.shape != (self.layout.numel,) or self.vector.dtype != torch.float32:
            raise ValueError(
                f"The vector must be float32 of shape ({self.layout.numel},) as its layout says, "
                f"but is {self.vector.dtype} of shape {tuple(self.vector.shape)}."
            )

    @staticmethod
    def empty() -> FlatTensors:
        """No tensors at all."""
        return FlatTensors(Layout(), torch.zeros(0))

    @staticmethod
    def pack(tensors: Mapping[str, Tensor]) -> FlatTensors:
        """Copy named tensors, in the order of their names, into one float32 vector on the CPU."""
        names = tuple(sorted(tensors))
        layout = Layout(names, tuple(tuple(tensors[name].shape) for name in names))
        vector = torch.empty(layout.numel)
        for name, (start, stop) in layout.spans.items():
            vector[start:stop] = tensors[name].detach().reshape(-1)
        return FlatTensors(layout, vector)

    def unpack(self) -> dict[str, Tensor]:
        """Per name a view of the vector in its shape."""
        shapes = dict(zip(self.layout.names, self.layout.shapes, strict=True))
        return {name: self.vector[start:stop].view(shapes[name]) for name, (start, stop) in self.layout.spans.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the vector, which is what a transfer costs."""
        return self.vector.numel() * self.vector.element_size()


@dataclass(frozen=True, eq=False)
class SharedTensors:
    """What one client shares, split by who may mix it.

    Attributes:
        common: for every client, whatever its model: Co-LoRA's P and Q, named ``tower/block/role/P``.
        same_architecture: only for clients whose `ClientUpdate.architecture` is equal: A and B of conventional layers,
            named ``<layer>.A`` and ``<layer>.B`` so that a rule knows which two belong together (`Layout.factors`).
    """

    common: FlatTensors = field(default_factory=FlatTensors.empty)
    same_architecture: FlatTensors = field(default_factory=FlatTensors.empty)

    @property
    def nbytes(self) -> int:
        """Bytes of both vectors."""
        return self.common.nbytes + self.same_architecture.nbytes


def _equal(one: SharedTensors, other: SharedTensors) -> bool:
    pairs = ((one.common, other.common), (one.same_architecture, other.same_architecture))
    return all(a.layout == b.layout and torch.equal(a.vector, b.vector) for a, b in pairs)


@dataclass(frozen=True, eq=False)
class Personalized:
    """What the server sends to one client; a name that is not sent keeps the client's own value.

    Attributes:
        frozen: the global adapter G, held fixed beside the client's own adapter while it trains. None: no such
            branch, or nothing to fill it with yet.
        start: values that overwrite what the client trains (FedAvg's global model, a warm start). None: the client
            goes on from its own.
    """

    frozen: SharedTensors | None = None
    start: SharedTensors | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that travel to the client; what is frozen and a start at once travels once."""
        parts = [part for part in (self.frozen, self.start) if part is not None]
        return parts[0].nbytes if len(parts) == 2 and _equal(*parts) else sum(part.nbytes for part in parts)


@dataclass(frozen=True, eq=False)
class Letter:
    """Shared tensors as bytes.

    Attributes:
        common: of the tensors for everybody; empty where there are none.
        same_architecture: of those for clients of one architecture.
    """

    common: bytes = b""
    same_architecture: bytes = b""

    @property
    def nbytes(self) -> int:
        """All that travels."""
        return len(self.common) + len(self.same_architecture)


@dataclass(frozen=True, eq=False)
class UpdateLetter:
    """What a client sends, as bytes.

    Attributes:
        shared: its tensors.
        sketch: of its task; None: none.
        keys: of its questions; None: none.
    """

    shared: Letter
    sketch: bytes | None = None
    keys: bytes | None = None

    @property
    def nbytes(self) -> int:
        """All that travels."""
        return self.shared.nbytes + len(self.sketch or b"") + len(self.keys or b"")


@dataclass(frozen=True, eq=False)
class PersonalizedLetter:
    """What a client receives (`Personalized`), as bytes. One letter may be both parts, and then travels once."""

    frozen: Letter | None = None
    start: Letter | None = None

    @property
    def nbytes(self) -> int:
        """All that travels."""
        parts = [part for part in (self.frozen, self.start) if part is not None]
        return parts[0].nbytes if self.frozen is self.start and parts else sum(part.nbytes for part in parts)


@dataclass(frozen=True, eq=False)
class Assignment:
    """One client's turn in one round.

    Attributes:
        client_id: whose turn it is.
        round: from 0.
        personalized: what the server sends along; a `PersonalizedLetter` where a wire format is chosen.
    """

    client_id: str
    round: int
    personalized: Personalized | PersonalizedLetter = field(default_factory=Personalized)


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """What one client sends to the server after its turn.

    Attributes:
        client_id: who sends it.
        round: in which round it was trained, from 0.
        num_examples: on how many training examples; the weight in a sample-weighted mean. 0: the client had nothing to
            train on, and the server leaves it out of the round before any rule sees it.
        architecture: equal for clients whose `SharedTensors.same_architecture` may be mixed.
        shared: the client's trained tensors L.
        sketch: what its task looks like, float32 of shape ``[k]``; None when no probe runs.
        keys: what the questions look like that it has trained on, float32 of shape ``[m, 1 + 2 k]``
            (`functional.routing.Keys`); None when nothing gathers them.
        metrics: the client's own metrics of the round, by the user's names.
        staleness: so many rounds after `round` it is mixed; the server's own knowledge, whatever a client says.
    """

    client_id: str
    round: int
    num_examples: int
    architecture: str
    shared: SharedTensors
    sketch: Tensor | None = None
    keys: Tensor | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    staleness: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that travel to the server."""
        beside = [tensor for tensor in (self.sketch, self.keys) if tensor is not None]
        return self.shared.nbytes + sum(tensor.numel() * tensor.element_size() for tensor in beside)


@dataclass(frozen=True, eq=False)
class Aggregation:
    """The server's answer to a round's updates.

    Attributes:
        personalized: what each known client receives next, by client id.
        newcomer: what a client receives that has never sent anything.
        state: what the aggregator needs to go on next round: plain containers of tensors, numbers and strings, so that
            it can be saved and loaded with ``weights_only=True``.
        client_ids: the known clients, in the order of the rows and columns below.
        weights: shape ``[N, N]``; row i is how client i's mixture weighs the clients. None where nothing is mixed.
        similarity: shape ``[N, N]``, cosine of the sketches. None without sketches.
        notes: what the log should say about this round (a uniform row for lack of a sketch, an update left out).
    """

    personalized: Mapping[str, Personalized]
    newcomer: Personalized
    state: Mapping[str, Any]
    client_ids: Sequence[str]
    weights: Tensor | None = None
    similarity: Tensor | None = None
    notes: Sequence[str] = ()
