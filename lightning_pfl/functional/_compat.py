"""The private names of torch that this room relies on, read in torch 2.13 (the bound in pyproject.toml)."""

from collections.abc import Collection, Iterable
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = ["TreeSpec", "editions", "groups", "tree_flatten", "tree_unflatten"]

_VERSION = attrgetter("_version")


def groups(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """The dicts in which modules hold their parameters, buffers and children."""
    return [group for one in modules for group in (one._parameters, one._buffers, one._modules)]


def editions(tensors: Collection[Tensor]) -> list[tuple[int, int]]:
    """What changes when somebody writes to a tensor or gives it other memory; writing through ``.data`` goes unseen."""
    return list(zip(map(_VERSION, tensors), map(Tensor.data_ptr, tensors), strict=True))
