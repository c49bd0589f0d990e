r"""What makes a number that leaves a client safe to send: a bound on one's influence, and noise. Pure arithmetic.

Start at `clip_rows`, which bounds what one example can do to a mean, and `gaussian_noise`, which hides the rest. What a
sequence of such releases costs is counted in `accounting`.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["clip_rows", "gaussian_noise", "noise_context"]

_MARGIN = 1 - 2.0**-20  # so that a row does not exceed the bound once it is rounded to float32
_BITS = 53  # of a float64's fraction


def clip_rows(rows: Tensor, max_norm: float) -> Tensor:
    """Scale every row that is longer than a norm down to it; shorter rows stay as they are.

    Args:
        rows: shape ``[n, k]``.
        max_norm: C, > 0.

    Returns:
        Fresh, shape ``[n, k]``, in the dtype of ``rows``; no row is longer than C.

    Raises:
        ValueError: C is not positive, or a row holds NaN or infinity, which no scale can bound.

    Source:
        Abadi et al., CCS 2016, arXiv:1607.00133, Algorithm 1.

    Example:
        >>> clip_rows(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), max_norm=2.5)
        tensor([[1.5000, 2.0000],
                [0.0000, 1.0000]])
    """
    if not 0 < max_norm < math.inf:
        raise ValueError(f"`max_norm` must be positive and finite, but is {max_norm}.")
    norms = torch.linalg.vector_norm(rows.double(), dim=1, keepdim=True)
    if not bool(torch.isfinite(norms).all()):
        raise ValueError(
            f"Rows {(~torch.isfinite(norms[:, 0])).nonzero()[:, 0].tolist()[:5]} hold NaN or infinity and have no norm "
            "to clip. Look at these examples and at the precision of what made them."
        )
    scale = torch.where(norms > max_norm, max_norm * _MARGIN / norms.clamp(min=max_norm), 1.0)
    return (rows * scale).to(rows.dtype)


def gaussian_noise(size: int, *, key: bytes, context: bytes) -> Tensor:
    """Standard normal numbers that nobody can guess who does not have the key.

    The same key and context give the same numbers on one machine; any other context gives others that are independent
    of them for whoever does not have the key. The stream is SHAKE-256, turned into normal numbers by Box and Muller;
    torch's own generator would not do, since it starts from 32 bits, which can be tried one by one.

    Args:
        size: how many.
        key: secret, at least 16 bytes.
        context: what the noise is for; see `noise_context`.

    Returns:
        float64, shape ``[size]``.

    Raises:
        ValueError: a key that is too short.

    Example:
        >>> noise = gaussian_noise(10_000, key=bytes(32), context=b"an example")
        >>> round(noise.mean().item(), 1), round(noise.std().item(), 1)
        (0.0, 1.0)
    """
    if len(key) < 16:
        raise ValueError(f"A noise key must have at least 16 bytes, but has {len(key)}.")
    pairs = (size + 1) // 2
    stream = hashlib.shake_256(len(key).to_bytes(4, "little") + key + context).digest(16 * pairs)
    bits = np.frombuffer(stream, dtype="<u8").reshape(2, pairs) >> np.uint64(64 - _BITS)
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-_BITS  # above 0 and below 1
    radius, angle = np.sqrt(-2.0 * np.log(uniform[0])), 2.0 * np.pi * uniform[1]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return torch.from_numpy(normal[:size].copy())


def noise_context(purpose: str, client_id: str, round: int, value: Tensor) -> bytes:
    """Say what noise is for, so precisely that no two different releases can ever get the same noise.

    The value that is to be hidden is part of the context. So a turn that is run again after a failure, on the same
    data, sends the same bytes and tells nothing more; and if it comes out differently (resumed with other data or
    another learning rate), its noise is different too, and the difference of the two does not lay the values bare.

    Args:
        purpose: what is sent, ``"sketch"`` or ``"update"``.
        client_id: by whom.
        round: when.
        value: the bounded value, before noise.

    Example:
        >>> one = noise_context("sketch", "ward-3", 0, torch.zeros(2))
        >>> one == noise_context("sketch", "ward-3", 0, torch.zeros(2))
        True
        >>> one == noise_context("sketch", "ward-3", 0, torch.tensor([0.0, 1e-9]))
        False
    """
    digest = hashlib.sha256()
    for part in (purpose.encode(), client_id.encode(), str(round).encode(), str(value.dtype).encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()
