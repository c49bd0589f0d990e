"""Private and semi-private names of transformers that probes read; seen in transformers 5.20 to 5.23.

All of it is duck-typed, so that a model without transformers works too as long as it has the same few attributes.
"""

from __future__ import annotations

import inspect
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "MLP_OUTPUT_NAMES",
    "is_conv1d",
    "keyword_arguments",
    "load_causal_lm",
    "logits_of",
    "norm_epsilon",
    "output_head",
    "softcap",
]

MLP_OUTPUT_NAMES = ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "wo")
"""What transformers' model files call the linear that leads out of a block's MLP."""


def load_causal_lm(path_or_id: str | PathLike[str], dtype: torch.dtype) -> nn.Module:
    """Load a causal language model from a folder or the hub."""
    from transformers import AutoModelForCausalLM  # importing transformers costs seconds; only who loads one pays

    model: nn.Module = AutoModelForCausalLM.from_pretrained(fspath(path_or_id), dtype=dtype)
    return model


def output_head(model: nn.Module) -> nn.Module | None:
    """The linear that makes logits; None if the model does not say."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else getattr(model, "lm_head", None)
    return head if isinstance(head, nn.Module) else None


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D: a linear whose weight is stored transposed, ``[in, out]``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


def norm_epsilon(module: nn.Module) -> float | None:
    """What a normalising layer adds to the mean square; families disagree on the attribute's name."""
    for name in ("eps", "variance_epsilon", "epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def softcap(model: nn.Module) -> float | None:
    """The bound c of ``c * tanh(logits / c)``; None without such capping."""
    config: Any = getattr(model, "config", None)
    for place in (config, getattr(config, "text_config", None)):
        value = getattr(place, "final_logit_softcapping", None)
        if value is not None:
            return float(value)
    return None


def keyword_arguments(model: nn.Module) -> dict[str, Any]:
    """What to pass to ``forward`` beside the batch: no cache, where the model has one."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output, which may be an object, a mapping, a tuple or a tensor."""
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    if not isinstance(logits, Tensor):
        raise TypeError(f"A causal language model must return logits, but returned {type(output).__name__}.")
    return logits
