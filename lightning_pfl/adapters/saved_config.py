"""A `CoLoraConfig` from a file that came from elsewhere: checked value by value before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lightning_pfl.adapters.config import CoLoraConfig
from lightning_pfl.documents import Schema

__all__ = ["config_from"]

_NAMES = {"anyOf": [{"type": "null"}, {"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_TEXT_OR_NULL = {"anyOf": [{"type": "null"}, {"type": "string"}]}
_WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
_ADDRESS = {"type": "string", "pattern": r"^[^/\n]+/[0-9]{1,6}/[^/\n]+\Z"}
_SCHEMA = Schema(
    "The description of adapters",
    {
        "type": "object",
        "required": ["r", "alpha"],
        "properties": {
            "r": {"type": "integer", "minimum": 1, "maximum": 2**20},
            "alpha": {"type": "number", "exclusiveMinimum": 0},
            "num_blocks": {"type": "integer", "minimum": 0, "maximum": 2**20},
            "target_modules": _NAMES,
            "exclude_modules": _NAMES,
            "blocks": {"anyOf": [_TEXT_OR_NULL, _WORDS]},
            "private_layers": {"type": "boolean"},
            "roles": _WORDS,
            "dropout": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
            "seed": {"type": "integer", "minimum": -(2**63), "maximum": 2**64},
            "gate": {"type": "object", "required": ["class"], "properties": {"class": {"type": "string"}}},
            "global_branch": {"type": "boolean"},
            "placement": {
                "anyOf": [
                    {"type": "null"},
                    {"type": "object", "additionalProperties": {"anyOf": [{"type": "null"}, _ADDRESS]}},
                ]
            },
            "base_identity": _TEXT_OR_NULL,
            "base_model_name_or_path": _TEXT_OR_NULL,
            "revision": _TEXT_OR_NULL,
            "inference_mode": {"type": "boolean"},
            "task_type": _TEXT_OR_NULL,
            "auto_mapping": {"anyOf": [{"type": "null"}, {"type": "object"}]},
        },
    },
)


def config_from(values: Any, where: str) -> CoLoraConfig:
    """Make a config of plain values; names that this release does not know are left out.

    Args:
        values: from JSON, or from a checkpoint.
        where: the file's name, for messages.

    Raises:
        ValueError: a value of another type or out of range; the message names it.

    Example:
        >>> config_from({"r": 4, "alpha": 8, "of_a_later_release": 1}, "adapter_config.json").scale
        2.0
    """
    _SCHEMA.check(values, where)
    assert isinstance(values, Mapping)
    known = {item.name for item in fields(CoLoraConfig)} - {"peft_type"}
    try:
        return CoLoraConfig(**{name: value for name, value in values.items() if name in known})
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"The description of adapters in `{where}` makes no config: {error}") from None
