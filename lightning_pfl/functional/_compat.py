"""The private names of torch that this room relies on, read in torch 2.13 (the bound in pyproject.toml)."""

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = ["TreeSpec", "edition", "tree_flatten", "tree_unflatten"]


def edition(tensor: Tensor) -> tuple[int, int]:
    """What changes when somebody writes to a tensor or gives it other memory; writing through ``.data`` goes unseen."""
    return tensor._version, tensor.data_ptr()
