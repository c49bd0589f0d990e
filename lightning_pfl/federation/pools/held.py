"""`Held`: which tensors that a client does not train are the same as another client's, without asking at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_pfl.federation.frozen import checksum
from lightning_pfl.functional.stacking import editions

__all__ = ["Held", "unequal"]


@dataclass(eq=False)
class _Value:
    """What one or several clients hold; as one object, so that nobody compares numbers a second time."""

    checksum: int
    clients: int = 1


@dataclass(frozen=True, eq=False)
class _Seen:
    tensor: Tensor
    edition: list[tuple[int, int]]
    value: _Value

    def is_untouched(self) -> bool:
        return editions([self.tensor]) == self.edition


@final
class Held:
    """One client's frozen tensors and buffers.

    They are compared with those of other clients when they are seen first. From then on a tensor has the value that it
    had, until somebody writes to it; then it is the client's own.

    Example:
        >>> mine, yours = Held(), Held()
        >>> mine.read({"base": torch.ones(2), "bias": torch.ones(2)}, [])
        >>> yours.read({"base": torch.ones(2), "bias": torch.zeros(2)}, [mine])
        >>> unequal([mine, yours])
        ['bias']
    """

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self._now: list[object] = []

    def read(self, tensors: Mapping[str, Tensor], others: Sequence[Held]) -> None:
        """Take note of tensors as they are now, and of who among the others holds the same."""
        now = [*map(id, tensors.values()), *editions(tensors.values())]
        if now == self._now:
            return
        self._now = now
        for name, tensor in tensors.items():
            before = self._seen.get(name)
            if before is None:
                found = (other._seen.get(name) for other in others)
                value = next(
                    (one.value for one in found if one and one.is_untouched() and _same(one.tensor, tensor)), None
                )
                if value is not None:
                    value.clients += 1
                self._seen[name] = _Seen(tensor, editions([tensor]), value or _Value(checksum(tensor)))
            elif before.tensor is not tensor or not before.is_untouched():
                self._seen[name] = _Seen(tensor, editions([tensor]), _Value(0))

    def check(self) -> None:
        """Raise if somebody wrote unseen to a tensor that was read for others too.

        Raises:
            RuntimeError: with the tensor's name.
        """
        for name, seen in self._seen.items():
            if seen.value.clients > 1 and seen.is_untouched() and checksum(seen.tensor) != seen.value.checksum:
                raise RuntimeError(
                    f"`{name}` is frozen, and had the same values in several clients that train stacked, but one of "
                    "them has changed it through `.data`, which cannot be seen while it trains. Change it in place "
                    "under `torch.no_grad()`, or train on another pool."
                )


def unequal(clients: Sequence[Held]) -> list[str]:
    """Names of the tensors whose values are not the same in all of them."""
    first, *others = (client._seen for client in clients)
    return [name for name in first if any(other[name].value is not first[name].value for other in others)]


def _same(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device) and torch.equal(one, other)
