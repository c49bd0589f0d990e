r"""The arithmetic of Co-LoRA and of its two-branch LoRA companion: tensors in, fresh tensors out.

Start at `colora_delta`. Column convention as in the paper: for one input :math:`x \in R^{d_{in}}`,

.. math:: h = W x + s B (P A x + Q), \qquad A \in R^{r \times d_{in}}, P \in R^{r \times r}, Q \in R^r,
          B \in R^{d_{out} \times r}

so a tensor of inputs has shape ``[..., d_in]`` and every matrix acts on its last dimension. Each function passes over
the inputs once with A and once with B, whatever it mixes in between. What the branches G (global, frozen) and L
(local, trained) weigh is the caller's business: ``g`` and ``l`` are plain numbers in tensors, for the whole batch
(shape ``[]``) or one per sample (shape ``[batch]``).

A convolution is such a matrix too, acting on the patches of its input (`lightning_pfl.functional.patches`): with
``patches`` given, inputs are ``[batch, c_in, *size]``, d_in is c_in times the size of the kernel, and outputs are
``[batch, d_out, *positions]``.

Source:
    "Co-LoRA: Collaborative Model Personalization on Heterogeneous Multi-Modal Clients", ICLR 2026, arXiv:2506.11024,
    section 3; Hu et al., "LoRA", ICLR 2022, arXiv:2106.09685, for the conventional layer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_pfl.functional.patches import Patches

__all__ = [
    "colora_delta",
    "colora_weight",
    "gated_colora_delta",
    "gated_lora_delta",
    "kaiming_rows",
    "lora_delta",
    "lora_weight",
    "one_thread",
    "orthonormal_bases",
    "seed_from",
    "stack_lora",
]


def colora_delta(
    x: Tensor, A: Tensor, B: Tensor, P: Tensor, Q: Tensor, *, scale: float, patches: Patches | None = None
) -> Tensor:
    """What one Co-LoRA branch adds to a layer's output, ``s B (P A x + Q)``.

    Args:
        x: inputs, ``[..., d_in]``.
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        P: ``[r, r]``.
        Q: ``[r]``.
        scale: s, which is alpha / r.
        patches: of a convolution; see above.

    Returns:
        ``[..., d_out]``.

    Example:
        >>> A, B = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [2.0], [3.0]])
        >>> colora_delta(torch.tensor([5.0, 7.0]), A, B, P=torch.tensor([[2.0]]), Q=torch.tensor([1.0]), scale=0.5)
        tensor([ 5.5000, 11.0000, 16.5000])
    """
    if patches is not None:
        return patches.map(patches.map(patches.read(x, A), scale * P, scale * Q), B)
    return F.linear(F.linear(F.linear(x, A), scale * P, scale * Q), B)


def gated_colora_delta(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    global_: tuple[Tensor, Tensor],
    local: tuple[Tensor, Tensor],
    g: Tensor,
    l: Tensor,  # noqa: E741 - the letter of the formula
    *,
    scale: float,
    patches: Patches | None = None,
) -> Tensor:
    """What two Co-LoRA branches add together, ``s B [g (P_G z + Q_G) + l (P_L z + Q_L)]`` with ``z = A x``.

    Args:
        x: inputs, ``[batch, ..., d_in]``; ``[..., d_in]`` when g and l have no batch dimension.
        A: ``[r, d_in]``, the same for both branches.
        B: ``[d_out, r]``, the same for both branches.
        global_: P_G ``[r, r]`` and Q_G ``[r]``.
        local: P_L ``[r, r]`` and Q_L ``[r]``.
        g: weight of the global branch, ``[]`` or ``[batch]``.
        l: weight of the local branch, the shape of g.
        scale: s.
        patches: of a convolution; see above.

    Returns:
        ``[batch, ..., d_out]``. With one weight for all, P and Q are mixed first (r x r numbers); with one per sample
        the rank-r vectors are, so that nothing of shape ``[batch, r, r]`` ever exists.

    Example:
        >>> one = torch.ones(1, 1)
        >>> P_G, P_L, Q = torch.tensor([[2.0]]), torch.tensor([[4.0]]), torch.zeros(1)
        >>> x = torch.tensor([[1.0], [1.0]])
        >>> g = torch.tensor([0.0, 0.5])
        >>> gated_colora_delta(x, one, one, (P_G, Q), (P_L, Q), g, 1 - g, scale=1.0).tolist()
        [[4.0], [3.0]]
    """
    (P_G, Q_G), (P_L, Q_L) = global_, local
    if g.dim() == 0:
        return colora_delta(x, A, B, g * P_G + l * P_L, g * Q_G + l * Q_L, scale=scale, patches=patches)
    z, apply = (F.linear(x, A), F.linear) if patches is None else (patches.read(x, A), patches.map)
    mixed = _per_sample(scale * g, z) * apply(z, P_G, Q_G) + _per_sample(scale * l, z) * apply(z, P_L, Q_L)
    return apply(mixed, B)


def lora_delta(x: Tensor, A: Tensor, B: Tensor, *, scale: float, patches: Patches | None = None) -> Tensor:
    """What one conventional branch adds, ``s B A x``.

    Args:
        x: inputs, ``[..., d_in]``.
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        scale: s.
        patches: of a convolution; see above.

    Returns:
        ``[..., d_out]``.

    Example:
        >>> lora_delta(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0]]), scale=0.5)
        tensor([3.])
    """
    if patches is not None:
        return patches.map(scale * patches.read(x, A), B)
    return F.linear(scale * F.linear(x, A), B)


def stack_lora(
    global_: tuple[Tensor, Tensor],
    local: tuple[Tensor, Tensor],
    g: Tensor,
    l: Tensor,  # noqa: E741 - the letter of the formula
) -> tuple[Tensor, Tensor]:
    """Two conventional branches as one of rank r_G + r, ``A = [A_G; A_L]`` and ``B = [g B_G, l B_L]``.

    Args:
        global_: A_G ``[r_G, d_in]`` and B_G ``[d_out, r_G]``; any rank.
        local: A_L ``[r, d_in]`` and B_L ``[d_out, r]``.
        g: weight of the global branch, ``[]``.
        l: weight of the local branch, ``[]``.

    Returns:
        A ``[r_G + r, d_in]`` and B ``[d_out, r_G + r]``.

    Example:
        >>> one = torch.ones(1, 1)
        >>> A, B = stack_lora((one, 4 * one), (3 * one, one), torch.tensor(0.25), torch.tensor(0.75))
        >>> A.tolist(), B.tolist()
        ([[1.0], [3.0]], [[1.0, 0.75]])
    """
    (A_G, B_G), (A_L, B_L) = global_, local
    return torch.cat([A_G, A_L]), torch.cat([g * B_G, l * B_L], dim=1)


def gated_lora_delta(
    x: Tensor,
    global_: tuple[Tensor, Tensor],
    local: tuple[Tensor, Tensor],
    g: Tensor,
    l: Tensor,  # noqa: E741 - the letter of the formula
    *,
    scale: float,
    patches: Patches | None = None,
) -> Tensor:
    """What two conventional branches add together, ``s [g B_G A_G x + l B_L A_L x]``, one product each way.

    Args:
        x: inputs, ``[batch, ..., d_in]``; ``[..., d_in]`` when g and l have no batch dimension.
        global_: A_G ``[r_G, d_in]`` and B_G ``[d_out, r_G]``; any rank.
        local: A_L ``[r, d_in]`` and B_L ``[d_out, r]``.
        g: weight of the global branch, ``[]`` or ``[batch]``.
        l: weight of the local branch, the shape of g.
        scale: s.
        patches: of a convolution; see above.

    Returns:
        ``[batch, ..., d_out]``.

    Example:
        >>> one = torch.ones(1, 1)
        >>> x, g = torch.tensor([[1.0], [1.0]]), torch.tensor([0.0, 1.0])
        >>> gated_lora_delta(x, (one, 2 * one), (one, 5 * one), g, 1 - g, scale=1.0).tolist()
        [[5.0], [2.0]]
    """
    both = torch.cat([global_[0], local[0]])
    z, apply = (F.linear(x, both), F.linear) if patches is None else (patches.read(x, both), patches.map)
    if g.dim() == 0:
        return apply(z, stack_lora(global_, local, scale * g, scale * l)[1])
    ranks = global_[0].shape[0], local[0].shape[0]
    weights = torch.cat([(scale * w)[:, None].expand(-1, rank) for w, rank in zip((g, l), ranks, strict=True)], dim=1)
    middle = [1] * (z.dim() - 2)
    shape = (-1, *middle, sum(ranks)) if patches is None else (-1, sum(ranks), *middle)
    weights = weights.reshape(shape)
    return apply(weights.to(z.dtype) * z, torch.cat([global_[1], local[1]], dim=1))


def colora_weight(A: Tensor, B: Tensor, P: Tensor, Q: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """What a Co-LoRA branch adds to a weight and to a bias, ``s B P A`` and ``s B Q``.

    Args:
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        P: ``[r, r]``.
        Q: ``[r]``.
        scale: s.

    Returns:
        ``[d_out, d_in]`` and ``[d_out]``.

    Example:
        >>> one = torch.ones(1, 1)
        >>> weight, bias = colora_weight(one, 2 * one, 3 * one, torch.ones(1), scale=0.5)
        >>> weight.item(), bias.item()
        (3.0, 1.0)
    """
    return B @ (scale * P) @ A, B @ (scale * Q)


def lora_weight(A: Tensor, B: Tensor, *, scale: float) -> Tensor:
    """What a conventional branch adds to a weight, ``s B A``.

    Args:
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        scale: s.

    Returns:
        ``[d_out, d_in]``.

    Example:
        >>> lora_weight(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), scale=2.0)
        tensor([[ 6., 12.]])
    """
    return (scale * B) @ A


def orthonormal_bases(rank: int, in_features: int, out_features: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Random frozen bases of a Co-LoRA layer.

    Args:
        rank: r, at most the smaller of the two widths.
        in_features: d_in.
        out_features: d_out.
        seed: the same seed and sizes give the same bytes, whatever number of threads torch uses.

    Returns:
        A ``[r, d_in]`` with orthonormal rows and B ``[d_out, r]`` with orthonormal columns, float32.

    Raises:
        ValueError: a rank larger than a width.

    Example:
        >>> A, B = orthonormal_bases(2, 4, 3, seed=0)
        >>> torch.allclose(A @ A.T, torch.eye(2), atol=1e-6), torch.allclose(B.T @ B, torch.eye(2), atol=1e-6)
        (True, True)
    """
    if not 0 < rank <= min(in_features, out_features):
        raise ValueError(
            f"Orthonormal bases of rank {rank} need widths of at least {rank}, "
            f"but the layer maps {in_features} to {out_features} features. Lower the rank or exclude the layer."
        )
    generator = torch.Generator().manual_seed(seed)
    return _orthonormal_columns(in_features, rank, generator).T.contiguous(), _orthonormal_columns(
        out_features, rank, generator
    )


def kaiming_rows(rank: int, in_features: int, *, seed: int) -> Tensor:
    """A random A for a conventional layer: uniform within ``1 / sqrt(d_in)``, which is Kaiming with a = sqrt(5).

    Args:
        rank: r.
        in_features: d_in.
        seed: the same seed and sizes give the same bytes.

    Returns:
        ``[r, d_in]``, float32.

    Example:
        >>> kaiming_rows(2, 4, seed=0).abs().max() <= 0.5
        tensor(True)
    """
    bound = 1 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))


def seed_from(*parts: str | int) -> int:
    """One seed from several facts, the same in every process (Python's own `hash` is not).

    Args:
        parts: what the seed depends on, in order.

    Returns:
        An integer in [0, 2**63).

    Example:
        >>> seed_from(0, "llama", "main", 1, "q") == seed_from(0, "llama", "main", 1, "q")
        True
        >>> seed_from("ab", "c") == seed_from("a", "bc")
        False
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _per_sample(weights: Tensor, z: Tensor) -> Tensor:
    """One number per sample, ``[batch]``, in the shape that multiplies ``[batch, ..., r]``."""
    return weights.reshape(-1, *[1] * (z.dim() - 1)).to(z.dtype)


def _orthonormal_columns(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A uniformly random matrix with orthonormal columns: QR of a Gaussian one, with R's diagonal made positive."""
    gaussian = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    with one_thread():
        q, r = torch.linalg.qr(gaussian)
    signed: Tensor = q * r.diagonal().sign()
    return signed.float()


@contextmanager
def one_thread() -> Iterator[None]:
    """For factorisations, whose last bits depend on the number of threads, where results must not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
