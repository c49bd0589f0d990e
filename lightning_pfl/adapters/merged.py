"""A model with its adapter merged in, for those who have transformers or plain torch and nothing of ours.

Start at `export_merged`: a folder that ``AutoModel...from_pretrained`` loads. `merged_state` is the same as tensors,
for any module. Nothing of the model at hand is changed.

Q makes a bias, and most language models have layers without one. Many of their classes can have it and only need to be
told in their config (Llama's ``attention_bias`` and ``mlp_bias``); `export_merged` finds the flags by trying them.
Where a class cannot, an object says what happens: `RefuseBias`, `AsClass` (Qwen2 is a Llama with other biases),
`DropBias`.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lightning_pfl.adapters._compat import Conv1D
from lightning_pfl.adapters.injection import ADAPTER, adapted_layers, config_of
from lightning_pfl.adapters.layer import CoLoraLayer
from lightning_pfl.adapters.model import CoLoraModel

__all__ = ["AsClass", "DropBias", "NoBiasPolicy", "RefuseBias", "export_merged", "merged_state", "plain_model"]

log = logging.getLogger(__name__)


class NoBiasPolicy(ABC):
    """What to do with the bias that Q is where the model's class has no place for one."""

    @abstractmethod
    def place(self, model: PreTrainedModel, state: Mapping[str, Tensor], homeless: list[str]) -> PreTrainedModel:
        """Say which model is written.

        Args:
            model: with its adapters; left alone.
            state: all merged tensors, by the names of the model without adapters.
            homeless: names of biases in ``state`` that the model's class has no place for, whatever its config says.

        Returns:
            A model without memory (on torch's meta device) that has a place for every tensor that shall be written.

        Raises:
            ValueError: none can be made.
        """


@dataclass(frozen=True)
class RefuseBias(NoBiasPolicy):
    """Write nothing, and say what else can be done."""

    def place(self, model: PreTrainedModel, state: Mapping[str, Tensor], homeless: list[str]) -> PreTrainedModel:
        """Always raises."""
        raise ValueError(
            f"Q of a Co-LoRA layer is a bias, but a {type(model).__name__} has no place for {_few(homeless)}, and its "
            "config knows no flag that makes one. Keep the adapter beside the model (`export_adapter`, or "
            "`export_lora`, whose B can have a bias); write it as a class that computes the same and has biases, if "
            "there is one (`if_no_bias=AsClass(LlamaForCausalLM)` for Qwen2 and Mistral); or lose Q's share of the "
            "output with `if_no_bias=DropBias()`."
        )


@dataclass(frozen=True)
class DropBias(NoBiasPolicy):
    """Leave out the biases that have no place, and warn with their size. The outputs are then others.

    One bias makes no difference: that of an attention's keys without rotary positions (all that Whisper has no place
    for), since it adds the same to all scores of a query, and softmax takes that away again.
    """

    def place(self, model: PreTrainedModel, state: Mapping[str, Tensor], homeless: list[str]) -> PreTrainedModel:
        """The model's own class, with whatever biases it can have."""
        norms = [state[name].float().norm().item() for name in homeless]
        log.warning(
            "Biases of %d layers are left out, since a %s has no place for them: %s. Their norms are %.3g to %.3g; "
            "outputs differ from the unmerged model's by what they add.",
            len(homeless),
            type(model).__name__,
            _few(homeless),
            min(norms),
            max(norms),
        )
        return _skeleton(type(model), _with_biases(type(model), model.config, set(state))[0])


@dataclass(frozen=True)
class AsClass(NoBiasPolicy):
    """Write the model as another class that computes the same from the same names: Qwen2, Mistral as Llama.

    Its config takes over what the two configs have in common. The two classes are run side by side on the base model's
    weights and a few random tokens, and refused if their outputs differ; this takes the memory of a second model.

    Args:
        kind: the class, such as ``transformers.LlamaForCausalLM``.
    """

    kind: type[PreTrainedModel]

    def place(self, model: PreTrainedModel, state: Mapping[str, Tensor], homeless: list[str]) -> PreTrainedModel:
        """The other class, with its biases."""
        name = self.kind.__name__
        windows = {kind for kind in getattr(model.config, "layer_types", None) or () if kind != "full_attention"}
        if windows or (
            getattr(model.config, "sliding_window", None) and getattr(model.config, "use_sliding_window", True)
        ):
            raise ValueError(
                f"A {type(model).__name__} with sliding windows cannot be written as {name}: it would compute the same "
                "for short texts only. Use `export_adapter` or `export_lora`."
            )
        common = {
            key: value
            for key, value in model.config.to_dict().items()
            if key in self.kind.config_class().to_dict() and key not in ("model_type", "architectures")
        }
        config, left = _with_biases(self.kind, self.kind.config_class(**common), set(state))
        target = _skeleton(self.kind, config)
        absent = set(target.state_dict()) - set(state) - _new_biases(target, state)
        if left or absent:
            raise ValueError(
                f"A {type(model).__name__} cannot be written as {name}, which has no place for {_few(sorted(left))} "
                f"and asks for {_few(sorted(absent))}. Use `export_adapter` or `export_lora`."
            )
        _compare(model, self.kind(config))
        return target


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module without adapters that computes what this one does.

    Args:
        module: with adapters; left alone. Only the adapted layers' tensors are new, the others are the module's own.

    Returns:
        By the names that the module had before adapters came in. A Co-LoRA layer without a bias receives one, unless
        its Q is zero. Parameters that the module ties are other ones here if a layer that has one of them has an
        adapter, which a warning says: load them into a module that does not tie them.

    Raises:
        ValueError: no adapters; a gate that depends on the input; a base layer whose weights are quantised.

    Example:
        >>> from lightning_pfl.adapters import CoLoraConfig, inject
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1))
        >>> list(merged_state(mlp))
        ['0.weight', '0.bias', '2.weight', '2.bias', '4.weight', '4.bias']
    """
    state = _merged_state(module)
    if apart := _pulled_apart(module, state):
        log.warning(
            "The module ties %s to parameters elsewhere, from which the adapter makes them differ. A module that ties "
            "them will load one for both and compute something else.",
            _few(apart),
        )
    return state


def _merged_state(module: nn.Module) -> dict[str, Tensor]:
    config_of(module)
    layers = dict(adapted_layers(module))
    merged = {name: _merged(name, layer) for name, layer in layers.items()}  # all may refuse before anything is built
    state: dict[str, Tensor] = {}
    for key, tensor in module.state_dict().items():
        layer = next((name for name in _parents(key) if name in layers), None)
        if layer is None:
            state[key] = tensor
        else:  # once for the first of the layer's tensors, so that the order is the model's
            state |= {f"{layer}.{part}": value for part, value in merged.pop(layer, {}).items()}
    return state


def export_merged(
    module: nn.Module,
    path: str | Path,
    *,
    if_no_bias: NoBiasPolicy = RefuseBias(),
) -> None:
    """Write a transformers model with its adapter merged in, as a folder that transformers alone loads.

    The sum is made in at least float32 and rounded once to the model's dtype. Logits of tiny models of twelve
    families, convolutions among them, differ from the unmerged ones, relative to their norm, by less than 1e-14 in
    float64, 3e-6 in float32 and 0.15 in bfloat16 (0.09 measured), whose weights have 8 bits: an unmerged model in
    bfloat16 is off from the same one in float64 by as much.

    Args:
        module: a transformers model with adapters, or a module that holds one with all adapters inside; left alone.
        path: the folder; made if it is not there.
        if_no_bias: what happens where Q needs a bias that the model's class cannot have.

    A head that the model ties to its embeddings and that has an adapter is written as one of its own
    (``tie_word_embeddings=False``), if the class then computes the same; this takes the memory of a second model.

    Raises:
        TypeError: not a transformers model.
        ValueError: no adapters; a gate that depends on the input (write it with `export_adapter`); biases without a
            place, see `NoBiasPolicy`; tied weights that an adapter pulls apart in a class that needs them tied (T5).

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
        >>> from lightning_pfl.adapters import CoLoraConfig, inject
        >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
        >>> llama = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> _ = inject(llama, CoLoraConfig(r=2, num_blocks=1))
        >>> llama.model.layers[1].self_attn.q_proj.colora_Q["default"].data.fill_(1.0)
        tensor([1., 1.])
        >>> with TemporaryDirectory() as folder:
        ...     export_merged(llama, folder)
        ...     AutoModelForCausalLM.from_pretrained(folder).config.attention_bias
        True
    """
    model = plain_model(module)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`export_merged` writes transformers models, but a {type(module).__name__} is none and holds none that "
            "has all adapters. For other modules, save `merged_state(module)`."
        )
    state = _merged_state(model)
    apart = _pulled_apart(model, state)
    if apart:
        _compare(model, type(model)(_untied(model.config)))
    config, left = _with_biases(type(model), model.config, set(state))
    target = if_no_bias.place(model, state, sorted(left)) if left else _skeleton(type(model), config)
    wanted = target.state_dict()
    zeros = _new_biases(target, state)
    missing = set(wanted) - set(state) - zeros
    assert not missing, f"{type(target).__name__} asks for {missing}"
    like = next(iter(state.values()))
    filled = {
        key: state[key] if key in state else torch.zeros(wanted[key].shape, dtype=model.dtype, device=like.device)
        for key in wanted
    }
    target.load_state_dict(filled, assign=True)
    if apart:
        target.config = _untied(target.config)
    target.tie_weights()
    lost = [name for name in apart if not torch.equal(target.state_dict()[name], filled[name])]
    if lost:
        raise ValueError(
            f"A {type(target).__name__} ties {_few(lost)} to other weights whatever its config says, and the adapter "
            "makes them differ. Use `export_adapter` or `export_lora`, or leave that layer out (`exclude_modules`)."
        )
    if getattr(model, "generation_config", None) is not None:
        target.generation_config = copy.deepcopy(model.generation_config)
    target.save_pretrained(Path(path))


def plain_model(module: nn.Module) -> nn.Module:
    """The model that an adapter belongs to: without PEFT's wrappers, and the transformers model inside a larger module
    where that holds all adapters."""
    if isinstance(module, PeftModel):
        module = module.base_model
    inside: nn.Module = module.model if isinstance(module, CoLoraModel) else module
    return _pretrained(inside)


def _pretrained(module: nn.Module) -> nn.Module:
    names = [name for name, _ in adapted_layers(module)]
    for inner, child in module.named_modules():
        if isinstance(child, PreTrainedModel) and all(name.startswith(f"{inner}." if inner else "") for name in names):
            found: nn.Module = child
            return found
    return module


@torch.no_grad()
def _merged(name: str, layer: CoLoraLayer) -> dict[str, Tensor]:
    """Weight and bias of one layer, as `CoLoraLayer.merge` would make them."""
    base = layer.get_base_layer()
    weight, bias = base.weight, base.bias
    layer.check_mergeable(ADAPTER)
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        raise ValueError(
            f"The weight of `{name}` is quantised ({weight.dtype}), and an adapter of low rank would be rounded away "
            "in it. Load the base model in bfloat16 or float32 and the adapter into that, or use `export_adapter`."
        )
    merged = {"weight": weight.detach(), **({} if bias is None else {"bias": bias.detach()})}
    if ADAPTER in layer.merged_adapters:
        return merged
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta, shift = layer.delta_weight(ADAPTER)
    delta = delta.T if isinstance(base, Conv1D) else delta.view_as(weight)
    merged["weight"] = (weight.to(wide) + delta.to(wide)).to(weight.dtype)
    if shift is not None and (bias is not None or bool(shift.any())):
        merged["bias"] = (shift.to(wide) if bias is None else bias.to(wide) + shift.to(wide)).to(weight.dtype)
    return merged


def _pulled_apart(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Adapted weights that the module ties to others, and that differ from these in a merged state."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.replace(".base_layer.", "."))
    adapted = {f"{name}.weight" for name, _ in adapted_layers(module)}
    return [
        name
        for tied in names.values()
        for name in adapted.intersection(tied)
        if not all(torch.equal(state[name], state[other]) for other in tied)
    ]


def _untied(config: PretrainedConfig) -> PretrainedConfig:
    """The same, and in all configs inside it, with a head of its own."""
    config = copy.deepcopy(config)
    inside = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    for part in (config, *inside):
        part.tie_word_embeddings = False
    return config


def _parents(key: str) -> Iterator[str]:
    """``a.b.weight`` lies in ``a.b`` and ``a``."""
    words = key.split(".")
    return (".".join(words[:stop]) for stop in range(len(words) - 1, 0, -1))


def _skeleton(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """A model without memory."""
    with torch.device("meta"):
        return kind(copy.deepcopy(config))


def _new_biases(target: PreTrainedModel, state: Mapping[str, Tensor]) -> set[str]:
    """Biases that come along with those that are needed, and are zero."""
    return {key for key in target.state_dict() if key not in state and key.endswith(".bias")}


def _with_biases(
    kind: type[PreTrainedModel], config: PretrainedConfig, needed: set[str]
) -> tuple[PretrainedConfig, set[str]]:
    """A config under which a class has a place for all names, as far as its flags go, and the names that are left."""
    config = copy.deepcopy(config)
    before = set(_skeleton(kind, config).state_dict())
    missing = needed - before
    for part, flag in _bias_flags(config) if missing else ():
        setattr(part, flag, True)
        now = set(_skeleton(kind, config).state_dict())
        added = now - before
        if added & missing and all(key.endswith(".bias") for key in added):
            before, missing = now, missing - now
        else:
            setattr(part, flag, False)
    return config, missing


def _bias_flags(config: PretrainedConfig) -> list[tuple[Any, str]]:
    """What in a config, and in the configs inside it, says that there are no biases."""
    flags: list[tuple[Any, str]] = [
        (config, key) for key, value in vars(config).items() if "bias" in key and value is False
    ]
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            flags += _bias_flags(value)
    return flags


@torch.no_grad()
def _compare(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Run a class beside another on the base model's own weights; the adapter's are added to both alike."""
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"A {type(model).__name__} cannot be compared with {type(other).__name__} on tokens, since it reads "
            f"`{model.main_input_name}`. Use `export_adapter` or `export_lora`."
        )
    layers = dict(adapted_layers(model))
    own = {
        key.replace(".base_layer.", "."): value
        for key, value in model.state_dict().items()
        if not any(name in layers and not key.startswith(f"{name}.base_layer.") for name in _parents(key))
    }
    filled = {key: own.get(key, torch.zeros_like(value)) for key, value in other.state_dict().items()}
    other.to(model.dtype).load_state_dict(filled)
    tokens = torch.randint(
        model.config.get_text_config().vocab_size, (2, 12), generator=torch.Generator().manual_seed(0)
    )
    training, disabled = model.training, {name: layer._disable_adapters for name, layer in layers.items()}
    decoded = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    try:
        for layer in layers.values():
            layer._disable_adapters = True
        expected = model.eval()(tokens.to(model.device), **decoded).logits.float().cpu()
    finally:
        model.train(training)
        for name, layer in layers.items():
            layer._disable_adapters = disabled[name]
    found = other.eval()(tokens, **decoded).logits.float()
    off = ((found - expected).norm() / expected.norm()).item()
    if not off < (1e-2 if model.dtype.itemsize < 4 else 1e-4):
        raise ValueError(
            f"A {type(model).__name__} cannot be written as {type(other).__name__}: with the base model's weights and "
            f"random tokens their logits differ by {off:.2g} of their norm. Use `export_adapter` or `export_lora`."
        )


def _few(names: list[str]) -> str:
    listed = [f"`{name}`" for name in names[:3]]
    return ", ".join(listed or ["nothing"]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
