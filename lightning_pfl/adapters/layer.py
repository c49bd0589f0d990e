r"""The adapted layer: Co-LoRA or conventional, with or without a global branch, one adapter per name.

Start at `CoLoraLinear`; `CoLoraConv` is the same around a convolution, whose input x is a patch. What it adds to the
base layer's output, with z = A x, s = alpha / r and the weights g, l that the gate policy gives to the global branch G
(frozen, from the server) and to the local one L (trained):

    Co-LoRA layer       s B [ g (P_G z + Q_G) + l (P_L z + Q_L) ]      A, B frozen; P, Q trained in L
    conventional layer  s [ g B_G A_G x + l B_L A_L x ]                A, B trained in L
    without G           the same with the local branch alone and l = 1

Which of the two an adapter is in this layer is a matter of the adapter: a second one may cut its blocks elsewhere.
Everything frozen is a buffer, so nothing can make it trainable by accident. P, Q, A, B and gates are float32 even when
the base layer is bfloat16. Every adapter starts at exactly zero. The base layer is called as it is, and its weight is
read only to merge, so it may be quantised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_pfl.adapters._compat import (
    AnyRankBuffers,
    BaseTunerLayer,
    Conv1D,
    FloatBuffers,
    FloatParameters,
    check_adapters_to_merge,
)
from lightning_pfl.adapters.adaptable import features, is_convolution, patches_of
from lightning_pfl.adapters.config import CoLoraConfig
from lightning_pfl.adapters.placement import Address
from lightning_pfl.adapters.prompts import PromptContext
from lightning_pfl.functional.colora import (
    colora_delta,
    colora_weight,
    gated_colora_delta,
    gated_lora_delta,
    kaiming_rows,
    lora_delta,
    lora_weight,
    orthonormal_bases,
    stack_lora,
)

__all__ = ["CoLoraConv", "CoLoraLayer", "CoLoraLinear"]

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # in any other dtype a weight is a code


class CoLoraLayer(nn.Module, BaseTunerLayer):
    """What a layer holds per adapter, what that adds to its output, and how it is merged into a weight.

    d_in is the number of columns of the layer's weight as a matrix: of a convolution, input channels times kernel size.
    Per adapter name: ``colora_P`` ``[r, r]``, ``colora_Q`` ``[r]`` and the frozen ``colora_basis_A`` ``[r, d_in]``,
    ``colora_basis_B`` ``[d_out, r]`` of a Co-LoRA layer; ``colora_A``, ``colora_B`` of a conventional one; with a
    global branch the frozen ``colora_global_*`` of the same shapes (A and B may have another rank) and the trained
    ``colora_gate``.
    """

    is_colora = True
    get_base_layer: Callable[[], Any]  # this and the next are PEFT's
    set_adapter: Callable[..., None]
    colora_P: FloatParameters
    colora_Q: FloatParameters
    colora_A: FloatParameters
    colora_B: FloatParameters
    colora_gate: FloatParameters
    colora_basis_A: FloatBuffers
    colora_basis_B: FloatBuffers
    colora_aligned: FloatBuffers
    colora_global_P: FloatBuffers
    colora_global_Q: FloatBuffers
    colora_global_A: AnyRankBuffers
    colora_global_B: AnyRankBuffers
    adapter_layer_names = ("colora_P", "colora_Q", "colora_A", "colora_B", "colora_gate")
    basis_names = ("colora_basis_A", "colora_basis_B", "colora_aligned")
    global_names = ("colora_global_P", "colora_global_Q", "colora_global_A", "colora_global_B")
    other_param_names = (*basis_names, *global_names, "colora_dropout", "colora_config", "colora_address")

    def __init__(self, base_layer: nn.Module, adapter_name: str, name: str, config: CoLoraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        for attribute in self.adapter_layer_names:
            setattr(self, attribute, FloatParameters())
        for attribute in (*self.basis_names, *self.global_names):
            kind = AnyRankBuffers if attribute in ("colora_global_A", "colora_global_B") else FloatBuffers
            setattr(self, attribute, kind())
        self.colora_dropout = nn.ModuleDict()
        self.colora_config: dict[str, CoLoraConfig] = {}  # the model's, not a copy
        self.colora_address: dict[str, Address | None] = {}
        self.colora_context = PromptContext()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._unmerged: tuple[nn.Parameter, nn.Parameter | None] | None = None
        base = self.get_base_layer()
        self.in_features, self.out_features = features(base)
        self.num_channels: int = base.in_channels if is_convolution(base) else self.in_features
        self.patches = patches_of(base)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, name, config)

    def update_layer(self, adapter_name: str, name: str, config: CoLoraConfig) -> None:
        """Make an adapter in this layer.

        Args:
            adapter_name: PEFT's name of the adapter.
            name: the layer's name in the model, which together with the config decides what is made.
            config: a resolved config.
        """
        base = self.get_base_layer().weight
        dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        address = config.address(name)
        if address is not None:
            A, B = orthonormal_bases(
                config.r,
                self.in_features,
                self.out_features,
                seed=config.seed_of(address.tower, address.block, address.role),
            )
            self.colora_basis_A[adapter_name] = A.to(base.device, dtype)
            self.colora_basis_B[adapter_name] = B.to(base.device, dtype)
            self.colora_aligned[adapter_name] = torch.zeros((), dtype=torch.bool, device=base.device)
            self.colora_P[adapter_name] = nn.Parameter(torch.zeros(config.r, config.r, dtype=dtype, device=base.device))
            self.colora_Q[adapter_name] = nn.Parameter(torch.zeros(config.r, dtype=dtype, device=base.device))
        else:
            A = kaiming_rows(config.r, self.in_features, seed=config.seed_of("private", name)).to(base.device, dtype)
            self.colora_A[adapter_name] = nn.Parameter(A)
            self.colora_B[adapter_name] = nn.Parameter(
                torch.zeros(self.out_features, config.r, dtype=dtype, device=base.device)
            )
        self.colora_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.colora_config[adapter_name] = config
        self.colora_address[adapter_name] = address
        if config.global_branch:
            self.add_global_branch(adapter_name)
        self.set_adapter(self.active_adapters)

    def state_of(self, adapter_name: str) -> dict[str, Tensor]:
        """Every tensor that an adapter has in this layer, by the attribute that holds it. The layer's own."""
        containers = {name: getattr(self, name) for name in (*self.adapter_layer_names, *self.basis_names)}
        containers |= {name: getattr(self, name) for name in self.global_names}
        return {name: held[adapter_name] for name, held in containers.items() if adapter_name in held}

    def add_global_branch(self, adapter_name: str) -> None:
        """Give an adapter its frozen global branch, equal to the local one, and a gate; a second time does nothing."""
        if self.has_global_branch(adapter_name):
            return
        local = self.local_tensors(adapter_name)
        for letter, tensor in local.items():
            getattr(self, f"colora_global_{letter}")[adapter_name] = tensor.detach().clone()
        like = next(iter(local.values()))
        shape = self.colora_config[adapter_name].gate.parameter_shape(self.num_channels)
        gate = nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
        self.colora_gate[adapter_name] = gate.requires_grad_(like.requires_grad)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that the output holds."""
        active = self._active_adapter
        return [active] if isinstance(active, str) else list(active)

    def has_global_branch(self, adapter_name: str) -> bool:
        """Whether the adapter has a global branch in this layer."""
        return adapter_name in self.colora_gate

    def local_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """The trained tensors of L: P and Q, or A and B. The layer's own, not copies."""
        letters = "AB" if self.colora_address[adapter_name] is None else "PQ"
        return {letter: getattr(self, f"colora_{letter}")[adapter_name] for letter in letters}

    def global_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """The frozen tensors of G, by the same letters. The layer's own, not copies."""
        letters = "AB" if self.colora_address[adapter_name] is None else "PQ"
        return {letter: getattr(self, f"colora_global_{letter}")[adapter_name] for letter in letters}

    def columns(self, x: Tensor) -> Tensor:
        """What A is applied to: the input itself, or the patches that a convolution reads of it, channels last.

        Args:
            x: the layer's input, ``[..., d_in]`` or ``[batch, c_in, *size]``.

        Returns:
            ``[..., d_in]`` or ``[batch, *positions, d_in]``.
        """
        return x if self.patches is None else self.patches.unfold(x)

    def delta_weight(self, adapter_name: str) -> tuple[Tensor, Tensor | None]:
        """What an adapter adds to the base layer's weight as a matrix, and, in a Co-LoRA layer, to its bias.

        Returns:
            ``[d_out, d_in]`` and ``[d_out]`` or None.

        Raises:
            ValueError: the gate depends on the input; the base layer is quantised.
        """
        config = self.colora_config[adapter_name]
        local = self.local_tensors(adapter_name)
        g = l = None  # noqa: E741 - the letters of the formula
        self.check_mergeable(adapter_name)
        if self.has_global_branch(adapter_name):
            g, l = config.gate.combine.weights(config.gate.beta(self.colora_gate[adapter_name], None))  # noqa: E741
        if self.colora_address[adapter_name] is None:
            A, B = local["A"], local["B"]
            if g is not None and l is not None:
                frozen = self.global_tensors(adapter_name)
                A, B = stack_lora((frozen["A"], frozen["B"]), (A, B), g, l)
            return lora_weight(A, B, scale=config.scale), None
        P, Q = local["P"], local["Q"]
        if g is not None and l is not None:
            frozen = self.global_tensors(adapter_name)
            P, Q = g * frozen["P"] + l * P, g * frozen["Q"] + l * Q
        A, B = self.colora_basis_A[adapter_name], self.colora_basis_B[adapter_name]
        return colora_weight(A, B, P, Q, scale=config.scale)

    def check_mergeable(self, adapter_name: str) -> None:
        """Raise if an adapter cannot become one weight and one bias, or the base layer's weight cannot be read."""
        weight = self.get_base_layer().weight
        if type(weight.data) is not Tensor or weight.dtype not in _PLAIN:
            raise ValueError(
                f"Adapter `{adapter_name}` cannot be merged: the weight of its {type(self.get_base_layer()).__name__} "
                f"is quantised ({type(weight).__name__}, {weight.dtype}), and what an adapter adds would be lost in "
                "its codes. Keep the adapter unmerged, or load the base model without quantisation, load the adapter "
                "into that, and merge there."
            )
        if self.has_global_branch(adapter_name) and self.colora_config[adapter_name].gate.reads_input:
            raise ValueError(
                f"Adapter `{adapter_name}` cannot be merged: its {type(self.colora_config[adapter_name].gate).__name__}"
                " weighs the branches anew for every input, and a merged weight is one for all inputs. Keep the adapter"
                " unmerged, or train with StaticGate()."
            )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the base layer's weight and bias: new tensors, the old ones are kept untouched.

        The sum is made in at least float32 and rounded once to the base layer's dtype. A Co-LoRA layer without a bias
        receives one. Outputs then differ from the unmerged layer's by rounding only: on a 576 x 1536 layer of rank 16
        by 7e-16 of their norm in float64, 4e-7 in float32 and 3e-3 in bfloat16 (whose weights have 8 bits).

        Args:
            safe_merge: raise instead of merging when the result is not finite.
            adapter_names: which adapters; None: the active ones.

        Raises:
            ValueError: a gate that depends on the input; a quantised base layer; a result that is not finite, if asked
                to check.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.colora_address]
        if not names:
            return
        base = self.get_base_layer()
        weight, bias = self._unmerged or (base.weight, base.bias)
        wide = torch.promote_types(weight.dtype, torch.float32)
        new_weight, new_bias = weight.to(wide), None if bias is None else bias.to(wide)
        for name in [*self.merged_adapters, *names]:
            delta, shift = self.delta_weight(name)
            new_weight = new_weight + (delta.T if isinstance(base, Conv1D) else delta.view_as(new_weight)).to(wide)
            if shift is not None:
                new_bias = shift.to(wide) if new_bias is None else new_bias + shift.to(wide)
        merged = [new_weight] if new_bias is None else [new_weight, new_bias]
        if safe_merge and not all(tensor.isfinite().all() for tensor in merged):
            raise ValueError(f"Merging {names} gives numbers that are not finite; the adapter is broken. Not merged.")
        self._unmerged = (weight, bias)
        base.weight = nn.Parameter(new_weight.to(weight.dtype), requires_grad=weight.requires_grad)
        if new_bias is not None:
            base.bias = nn.Parameter(
                new_bias.to(weight.dtype), requires_grad=weight.requires_grad if bias is None else bias.requires_grad
            )
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the untouched weight and bias back."""
        if self._unmerged is None:
            return
        base = self.get_base_layer()
        weight, bias = self._unmerged
        self._unmerged = None
        self.merged_adapters.clear()
        for name, old in (("weight", weight), ("bias", bias)):
            new = getattr(base, name)
            if old is not None and (old.device != new.device or old.dtype != new.dtype):  # moved while merged
                old = nn.Parameter(old.to(new.device, new.dtype), requires_grad=old.requires_grad)
            setattr(base, name, old)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT's, but without its cast: adapters stay float32 (called after loading with low_cpu_mem_usage)."""
        target = device or self.get_base_layer().weight.device
        for attribute in (*self.adapter_layer_names, *self.basis_names, *self.global_names):
            container = getattr(self, attribute)
            if adapter_name in container and container[adapter_name].device.type != "meta":
                container[adapter_name] = container[adapter_name].to(target)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus that of the active adapters, in the base output's dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.colora_address:
                result = result + self._delta(name, x).to(result.dtype)
        return result

    def _delta(self, adapter_name: str, x: Tensor) -> Tensor:
        if self.patches is not None and x.dim() == 1 + len(self.patches.kernel):  # torch's convolutions take one sample
            return self._delta(adapter_name, x[None])[0]
        config, patches = self.colora_config[adapter_name], self.patches
        local = self.local_tensors(adapter_name)
        is_gated = self.has_global_branch(adapter_name)
        kind = x.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            x = x.to(next(iter(local.values())).dtype)
        if is_gated:
            parameter = self.colora_gate[adapter_name]
            g, l = config.gate.combine.weights(  # noqa: E741 - the letters of the formula
                self.colora_context.beta(self, adapter_name, x if patches is None else x.movedim(1, -1), parameter)
                if config.gate.reads_input
                else config.gate.beta(parameter, None)
            )
            frozen = self.global_tensors(adapter_name)
        x = self.colora_dropout[adapter_name](x)
        if self.colora_address[adapter_name] is None:
            A, B = local["A"], local["B"]
            if not is_gated:
                return lora_delta(x, A, B, scale=config.scale, patches=patches)
            return gated_lora_delta(x, (frozen["A"], frozen["B"]), (A, B), g, l, scale=config.scale, patches=patches)
        P, Q = local["P"], local["Q"]
        A, B = self.colora_basis_A[adapter_name], self.colora_basis_B[adapter_name]
        if not is_gated:
            return colora_delta(x, A, B, P, Q, scale=config.scale, patches=patches)
        return gated_colora_delta(
            x, A, B, (frozen["P"], frozen["Q"]), (P, Q), g, l, scale=config.scale, patches=patches
        )

    def __repr__(self) -> str:
        return "colora." + super().__repr__()


@final
class CoLoraLinear(CoLoraLayer):
    """A linear layer (torch's `Linear`, transformers' `Conv1D`, quantised ones) with Co-LoRA or conventional adapters.

    Args:
        base_layer: the layer as it was; frozen, called as it is.
        adapter_name: PEFT's name of the first adapter.
        name: the layer's name in the model.
        config: a resolved config.

    Example:
        >>> config = CoLoraConfig(r=2, placement={"fc1": "main/0/fc1"}, base_identity="mlp")
        >>> layer = CoLoraLinear(nn.Linear(4, 3), "default", "fc1", config)
        >>> x = torch.ones(1, 4)
        >>> torch.equal(layer(x), layer.base_layer(x))
        True
    """


@final
class CoLoraConv(CoLoraLayer):
    """A convolution without groups, in one to three dimensions, with Co-LoRA or conventional adapters.

    A is r filters with the base layer's kernel, stride, padding and dilation; P, Q and B act at every position of what
    they give. An adapter so merges into one kernel and one bias, exactly at the borders too.

    Args:
        base_layer: the layer as it was; frozen, called as it is.
        adapter_name: PEFT's name of the first adapter.
        name: the layer's name in the model.
        config: a resolved config.

    Example:
        >>> config = CoLoraConfig(r=2, placement={"conv1": "main/0/conv1"}, base_identity="cnn")
        >>> layer = CoLoraConv(nn.Conv2d(4, 3, 3, padding=1), "default", "conv1", config)
        >>> layer.in_features, layer(torch.ones(1, 4, 5, 5)).shape
        (36, torch.Size([1, 3, 5, 5]))
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, name: str, config: CoLoraConfig) -> None:
        super().__init__(base_layer, adapter_name, name, config)
        base = self.get_base_layer()  # models ask their convolutions for these
        self.in_channels, self.out_channels, self.groups = base.in_channels, base.out_channels, base.groups
        self.kernel_size, self.stride, self.padding, self.dilation = (
            base.kernel_size,
            base.stride,
            base.padding,
            base.dilation,
        )
