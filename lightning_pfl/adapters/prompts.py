"""Which positions of an input a gate may read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["PromptContext"]


class PromptContext:
    """What the layers of one model know about the sequence they are given."""

    def beta(self, layer: Any, adapter_name: str, x: Tensor, parameter: Tensor) -> Tensor:
        """The opening of a gate that reads the input."""
        summary = x.mean(dim=tuple(range(1, x.dim() - 1))) if x.dim() > 2 else x
        beta: Tensor = layer.colora_config[adapter_name].gate.beta(parameter, summary)
        return beta
