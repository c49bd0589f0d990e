"""Every private name of PEFT, torch and transformers that the adapters rely on, and why.

Read in peft 0.21.2 (``peft>=0.21,<0.23``), transformers 5.23 and torch 2.13. A release that moves one of these breaks
here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, check_adapters_to_merge
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = [
    "CONFIG_NAME",
    "SAFETENSORS_WEIGHTS_NAME",
    "AnyRankBuffers",
    "BaseTuner",
    "BaseTunerLayer",
    "Conv1D",
    "ExcludedModule",
    "FloatBuffers",
    "FloatParameters",
    "PeftKey",
    "check_adapters_to_merge",
    "forward_pre_hooks",
    "in_backward",
    "register",
    "remember_in",
    "remembered_in",
]

ExcludedModule = _ExcludedModule  # what PEFT expects from `_check_target_module_exists` for an excluded module


class PeftKey(str):
    """The name of a PEFT method as PEFT's tables want it: a string that also answers `.value` and `.name`.

    PEFT's own keys are members of an enum of strings, which cannot be extended from outside; in a dictionary a member
    and its name are the same key.
    """

    @property
    def value(self) -> str:
        """The plain string."""
        return str(self)

    @property
    def name(self) -> str:
        """The plain string."""
        return str(self)

    __slots__ = ()


def register(key: PeftKey, config: type[PeftConfig], tuner: type[BaseTuner], prefix: str) -> None:
    """Make PEFT find a method by its key; doing it twice changes nothing."""
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = config
    PEFT_TYPE_TO_TUNER_MAPPING[key] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = prefix


def _at_least_float32(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Let a cast or a move through, but a cast below float32 only as far as float32."""

    def apply(tensor: Tensor) -> Tensor:
        out = function(tensor)
        if not (tensor.is_floating_point() and out.is_floating_point()):
            return out
        if torch.finfo(out.dtype).bits < 32 <= torch.finfo(tensor.dtype).bits:
            return tensor.to(out.device, torch.float32)
        return out

    return apply


class FloatParameters(nn.ParameterDict):
    """Parameters by adapter name that stay float32 when the model around them is cast to 16 bits."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(_at_least_float32(fn), recurse)


class FloatBuffers(BufferDict):
    """Persistent buffers by adapter name that stay float32 when the model around them is cast to 16 bits."""

    def __init__(self) -> None:
        super().__init__(persistent=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(_at_least_float32(fn), recurse)


class AnyRankBuffers(FloatBuffers):
    """Buffers that are factors of a product: one that is loaded may have another rank than the one that is there."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, held in list(self.items()):
            new = state_dict.get(f"{prefix}{name}")
            if isinstance(new, Tensor) and new.dim() == held.dim() == 2:
                equal = [one == other for one, other in zip(new.shape, held.shape, strict=True)]
                if any(equal) and not all(equal):
                    self[name] = held.new_empty(new.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def forward_pre_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """A module's own hooks before its forward, by torch's keys; the module's, not a copy."""
    return module._forward_pre_hooks


def in_backward() -> bool:
    """Whether a backward is under way in this thread: a layer that is called then is being recomputed."""
    return bool(torch._C._current_graph_task_id() != -1)


def remember_in(cache_object: Any, memory: dict[Any, Tensor]) -> None:
    """Keep tensors of one row per sample with a key-value cache of transformers, and in step with its rows.

    The cache gets a subclass of its own class, not closures in place of its methods, so that a deep copy of it (the
    usual way to reuse a prompt) follows its own reorderings.
    """
    if remembered_in(cache_object) is None:
        kind = type(cache_object)
        if kind not in _REMEMBERING:
            _REMEMBERING[kind] = _remembering(kind)
        cache_object.__class__ = _REMEMBERING[kind]
    cache_object.colora_memory = memory


def remembered_in(cache_object: Any) -> dict[Any, Tensor] | None:
    """What `remember_in` put there, None if nothing."""
    return getattr(cache_object, "colora_memory", None)


_REMEMBERING: dict[type[Any], type[Any]] = {}


def _remembering(kind: type[Any]) -> type[Any]:
    """A cache class that also reorders, repeats and selects the rows of what it remembers."""

    class Remembering(kind):
        colora_memory: dict[Any, Tensor]

        def _renew(self, rows: Callable[[Tensor], Tensor]) -> None:
            self.colora_memory = {key: rows(tensor) for key, tensor in self.colora_memory.items()}

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._renew(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._renew(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._renew(lambda tensor: tensor[indices.to(tensor.device)])

    Remembering.__name__ = kind.__name__
    Remembering.__qualname__ = kind.__qualname__
    return Remembering
