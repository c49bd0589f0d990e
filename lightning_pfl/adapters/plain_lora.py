"""An adapter as plain LoRA, for those who have PEFT and nothing of ours.

Start at `export_lora`. A conventional layer with a global branch is a LoRA of rank 2r, ``A = [A_G; A_L]``; a Co-LoRA
layer is one of rank r, since both its branches share A and B: ``B (P A x + Q)`` is LoRA with ``B P`` and a bias
``B Q``, which PEFT's ``lora_bias`` is for. Of a convolution A is r kernels, and B has a kernel of one. A rank of one's
own choice takes the best approximation, and says what it loses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_pfl.adapters._compat import SAFETENSORS_WEIGHTS_NAME, Conv1D
from lightning_pfl.adapters.adaptable import is_convolution
from lightning_pfl.adapters.injection import ADAPTER, adapted_layers, config_of
from lightning_pfl.adapters.layer import CoLoraLayer
from lightning_pfl.adapters.merged import plain_model
from lightning_pfl.functional.colora import stack_lora
from lightning_pfl.functional.low_rank import Factors, product_mean

__all__ = ["PlainLora", "export_lora"]


@dataclass(frozen=True)
class PlainLora:
    """What was written.

    Attributes:
        rank: of every layer; rows and columns of zeros fill up what has a lower one.
        has_bias: whether B has a bias, as Q needs it.
        lost: per layer, the share of its product's Frobenius norm that the rank has cut off, where it has.
    """

    rank: int
    has_bias: bool
    lost: Mapping[str, float]


def export_lora(
    module: nn.Module, path: str | Path, *, rank: int | None = None, base_model_name_or_path: str | None = None
) -> PlainLora:
    """Write a module's adapter as a plain PEFT LoRA folder, which computes the same.

    ``PeftModel.from_pretrained(base, path)`` then needs nothing of this package. Outputs are equal up to rounding (3e-6
    of their norm in float32) if nothing was cut off. PEFT computes a LoRA with a bias on layers that have none, but
    refuses to merge it; see `export_merged` for that. What runs LoRA elsewhere may not know ``lora_bias``.

    Args:
        module: with adapters; the transformers model inside, where that holds all adapters; left alone.
        path: the folder; made if it is not there.
        rank: of the LoRA. None: what is exact, 2r with a global branch (and conventional layers) and r without.
        base_model_name_or_path: what the folder says of the base model; None: what the model knows of it.

    Returns:
        What was written, with what a given rank has cost.

    Raises:
        ValueError: no adapters; a gate that depends on the input; a rank below 1; a convolution with dilation or
            with padding other than zeros, which PEFT's LoRA does not take over.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_pfl.adapters import CoLoraConfig, inject
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1, global_branch=True))
        >>> with TemporaryDirectory() as folder:
        ...     export_lora(mlp, folder)
        PlainLora(rank=4, has_bias=False, lost={})
    """
    if rank is not None and rank < 1:
        raise ValueError(f"The rank of a LoRA must be at least 1, but is {rank}.")
    model = plain_model(module)
    config = config_of(model)
    adapted: dict[str, CoLoraLayer] = dict(adapted_layers(model))
    layers = {name: _layer(name, layer) for name, layer in adapted.items()}
    lost: dict[str, float] = {}
    if rank is not None:
        for name, (factors, bias) in layers.items():
            if factors.rank > rank:
                cut = product_mean([factors], [1.0], rank=rank)
                layers[name] = (cut.factors, bias)
                if cut.lost > 1e-6:
                    lost[name] = cut.lost
    width = rank or max(factors.rank for factors, _ in layers.values())
    has_bias = any(bias is not None and bool(bias.any()) for _, bias in layers.values())
    tensors: dict[str, Tensor] = {}
    for name, (factors, bias) in layers.items():
        key = f"base_model.model.{name}.lora"
        A, B = _filled(factors.A, width, dim=0), _filled(factors.B, width, dim=1)
        tensors[f"{key}_A.weight"], tensors[f"{key}_B.weight"] = _kernels(A, B, adapted[name].get_base_layer())
        if has_bias:
            tensors[f"{key}_B.bias"] = factors.B.new_zeros(factors.B.shape[0]) if bias is None else bias
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(
        r=width,
        lora_alpha=config.scale * width,  # alpha / r is all that PEFT makes of it
        target_modules=list(layers),
        lora_bias=has_bias,
        lora_dropout=config.dropout,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in adapted.values()),
        task_type=config.task_type,
        inference_mode=True,
        base_model_name_or_path=base_model_name_or_path
        or config.base_model_name_or_path
        or getattr(model, "name_or_path", None)
        or None,
    ).save_pretrained(str(folder))
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(kept, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    return PlainLora(width, has_bias, lost)


@torch.no_grad()
def _layer(name: str, layer: CoLoraLayer) -> tuple[Factors, Tensor | None]:
    """One layer's A, B and bias, all without the scale."""
    layer.check_mergeable(ADAPTER)
    _check(name, layer.get_base_layer())
    local, g, l = layer.local_tensors(ADAPTER), None, None  # noqa: E741 - the letters of the formula
    if layer.has_global_branch(ADAPTER):
        gate = layer.colora_config[ADAPTER].gate
        g, l = gate.combine.weights(gate.beta(layer.colora_gate[ADAPTER], None))  # noqa: E741
        frozen = layer.global_tensors(ADAPTER)
        if layer.colora_address[ADAPTER] is None:
            return Factors(*stack_lora((frozen["A"], frozen["B"]), (local["A"], local["B"]), g, l)), None
        local = {letter: g * frozen[letter] + l * local[letter] for letter in "PQ"}
    if layer.colora_address[ADAPTER] is None:
        return Factors(local["A"], local["B"]), None
    A, B = layer.colora_basis_A[ADAPTER], layer.colora_basis_B[ADAPTER]
    return Factors(A, B @ local["P"]), B @ local["Q"]


def _check(name: str, base: nn.Module) -> None:
    """Raise unless PEFT's LoRA would read the input as the layer does."""
    way_out = "Use `export_adapter`, or exclude such layers with exclude_modules."
    if is_convolution(base):
        if any(gap != 1 for gap in base.dilation) or base.padding_mode != "zeros":
            raise ValueError(
                f"`{name}` is a {type(base).__name__} with dilation {tuple(base.dilation)} and padding_mode "
                f"{base.padding_mode!r}, and PEFT's LoRA of a convolution takes over neither: it would read other "
                f"patches. {way_out}"
            )
    elif not isinstance(base, (nn.Linear, Conv1D)):
        raise ValueError(
            f"`{name}` is a {type(base).__name__}, and only linear layers and convolutions can be written as plain "
            f"LoRA. {way_out}"
        )


def _kernels(A: Tensor, B: Tensor, base: nn.Module) -> tuple[Tensor, Tensor]:
    """A and B in the shapes that PEFT gives them: of a convolution, r kernels of its size, and kernels of one."""
    if not is_convolution(base):
        return A, B
    return A.unflatten(1, (base.in_channels, *base.kernel_size)), B[(..., *[None] * len(base.kernel_size))]


def _filled(tensor: Tensor, size: int, *, dim: int) -> Tensor:
    """With zeros at the end of a dimension, up to a size."""
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
