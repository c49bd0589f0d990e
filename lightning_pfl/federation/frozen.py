"""Which tensors a client's state may leave out: big frozen ones that are as every turn finds them.

A backbone would make every client's state as big as itself. It is left out if its bytes are what they were before the
turn, by a checksum over all of them, so that a frozen tensor which somebody does change (a teacher that follows its
student through ``.data``) stays in.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

__all__ = ["LARGE", "checksum", "checksums"]

LARGE = 64 * 1024
"""From how many bytes on a frozen tensor is looked at; smaller ones are always part of the state."""


def checksum(tensor: Tensor) -> int:
    """A number that changes with the tensor's bytes: their sum as 64-bit words, one pass over the memory.

    Example:
        >>> tensor = torch.zeros(1000)
        >>> before = checksum(tensor)
        >>> tensor[17] = 1e-30
        >>> checksum(tensor) == before
        False
    """
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    words = flat[:whole].view(torch.int64)
    return int(words.sum()) + int(flat[whole:].sum())


def checksums(module: nn.Module, known: Collection[str] = ()) -> dict[str, int]:
    """Checksums of a module's big frozen parameters and buffers, by their names in its ``state_dict``.

    Args:
        module: any.
        known: names to pass over.
    """
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    tensors: Mapping[str, object] = module.state_dict(keep_vars=True)
    return {
        name: checksum(tensor)
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor)
        and tensor.nbytes >= LARGE
        and name not in trained
        and name not in known
        and not tensor.is_sparse
    }
