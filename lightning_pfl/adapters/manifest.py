"""What an exported adapter folder says of itself: digests of its files, base model, ranks, round and client.

Start at `load_adapter`, our own way to read such a folder, which checks all of it. PEFT does not look at
``adapter_manifest.json`` and reads the folder as any other. The manifest is no signature: it tells damage and mistakes,
not a forger who writes a manifest of his own (for that there is `lightning_pfl.parties`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from lightning_pfl.adapters._compat import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from lightning_pfl.adapters.injection import ADAPTER, adapted_layers, config_of, inject
from lightning_pfl.adapters.saved_config import config_from
from lightning_pfl.adapters.tensors import architecture_of
from lightning_pfl.documents import FIT_FOR_A_PATH, SHA256, Schema

__all__ = ["MANIFEST_NAME", "load_adapter", "write_manifest"]

MANIFEST_NAME = "adapter_manifest.json"

_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
_TEXT_OR_NULL = {"anyOf": [{"type": "string", "maxLength": 4096}, {"type": "null"}]}
_SCHEMA = Schema(
    "An adapter's manifest",
    {
        "type": "object",
        "required": ["format", "files", "base", "architecture", "ranks", "client", "round"],
        "additionalProperties": False,
        "properties": {
            "format": {"const": 1},
            "files": {
                "type": "object",
                "required": list(_FILES),
                "propertyNames": {"pattern": FIT_FOR_A_PATH},
                "additionalProperties": SHA256,
            },
            "base": {
                "type": "object",
                "required": ["identity", "name_or_path", "dtype", "weights"],
                "additionalProperties": False,
                "properties": {
                    "identity": {"type": "string"},
                    "name_or_path": _TEXT_OR_NULL,
                    "dtype": {"type": "string"},
                    "weights": SHA256,
                },
            },
            "architecture": {"type": "string"},
            "ranks": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 1}},
            "client": {"anyOf": [{"type": "string", "pattern": FIT_FOR_A_PATH}, {"type": "null"}]},
            "round": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]},
        },
    },
)
_CONFIG = Schema("An adapter's config", {"type": "object"})
_PREFIX = "base_model.model."


def write_manifest(module: nn.Module, folder: Path, *, client: str | None = None, round: int | None = None) -> None:
    """Describe the adapter folder of a module; call it after everything else is in the folder.

    Args:
        module: whose adapters they are.
        folder: with the files.
        client: whose adapter it is, if it is one's of a federation.
        round: of which round, from 0.
    """
    config = config_of(module)
    dtype, weights = _base_weights(module)
    manifest = {
        "format": 1,
        "files": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in _FILES},
        "base": {
            "identity": config.base_identity,
            "name_or_path": json.loads((folder / CONFIG_NAME).read_bytes()).get("base_model_name_or_path"),
            "dtype": dtype,
            "weights": weights,
        },
        "architecture": architecture_of(module),
        "ranks": {name: config.r for name, _ in adapted_layers(module)},
        "client": client,
        "round": round,
    }
    _SCHEMA.check(manifest, str(folder / MANIFEST_NAME))
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(module: nn.Module, path: str | Path) -> Mapping[str, Any]:
    """Give a module the adapter of an exported folder, after checking that both belong together.

    Args:
        module: the base model, without adapters or with ones of the same config. Its tensors are copied into, in place.
        path: a folder from `export_adapter`, `CoLoRA.export` or `FederatedStrategy.export`.

    Returns:
        The manifest: ``client`` and ``round`` say whose adapter it is.

    Raises:
        FileNotFoundError: a file is missing; a folder without a manifest is for ``PeftModel.from_pretrained``.
        ValueError: a file is damaged or of another folder; another base model, or other weights in it (compared where
            its dtype is the one it was trained with); tensors that do not fit. The module is left as it was then,
            except that it may have gained adapters that compute zero.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_pfl.adapters import CoLoraConfig, export_adapter, inject
        >>> def base():
        ...     torch.manual_seed(0)
        ...     return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> trained = base()
        >>> _ = inject(trained, CoLoraConfig(r=2, num_blocks=1))
        >>> with TemporaryDirectory() as folder:
        ...     export_adapter(trained, folder, client="ward-3", round=4)
        ...     load_adapter(base(), folder)["client"]
        'ward-3'
    """
    folder = Path(path)
    manifest = _SCHEMA.read((folder / MANIFEST_NAME).read_bytes(), str(folder / MANIFEST_NAME))
    contents = {name: (folder / name).read_bytes() for name in _FILES}
    for name, content in contents.items():
        if (found := hashlib.sha256(content).hexdigest()) != manifest["files"][name]:
            raise ValueError(
                f"`{folder / name}` must have the sha256 {manifest['files'][name][:12]}... that the manifest beside it "
                f"names, but has {found[:12]}...: it is damaged, or of another folder. Export the adapter again."
            )
    config = config_from(_CONFIG.read(contents[CONFIG_NAME], str(folder / CONFIG_NAME)), str(folder / CONFIG_NAME))
    if config.placement is None or config.base_identity is None:
        raise ValueError(f"`{folder / CONFIG_NAME}` does not say where its adapters go. Export the adapter again.")
    _check_base(module, manifest["base"], config.base_identity, folder)
    tensors = _loaded(contents[SAFETENSORS_WEIGHTS_NAME], folder / SAFETENSORS_WEIGHTS_NAME)
    # names decide what is adapted, not patterns: one from elsewhere may be made to take for ever
    config = replace(config, target_modules=None, exclude_modules=None, roles={})
    config.inference_mode = False
    inject(module, config)
    own = {
        f"{_PREFIX}{name}.{attribute}": tensor
        for name, layer in adapted_layers(module)
        for attribute, tensor in layer.state_of(ADAPTER).items()
    }
    _check_tensors(tensors, own, folder)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    return dict(manifest)


def _check_base(module: nn.Module, base: Mapping[str, Any], identity: str, folder: Path) -> None:
    """The names and widths are checked when the adapters are placed; here, what they were trained on."""
    if base["identity"] != identity:
        raise ValueError(
            f"The files in `{folder}` do not belong together: they are for `{base['identity']}` and `{identity}`."
        )
    names = json.loads((folder / CONFIG_NAME).read_bytes())["placement"]
    modules = dict(module.named_modules())
    if missing := sorted(set(names) - set(modules)):
        raise ValueError(
            f"The adapter in `{folder}` was made for a model with the layers {missing[:4]}, which this "
            f"{type(module).__name__} does not have. Load it into its own base model, "
            f"`{base['name_or_path'] or base['identity']}`."
        )
    dtype, weights = _base_weights(module, names)
    if dtype == base["dtype"] and weights != base["weights"]:
        raise ValueError(
            f"The adapter in `{folder}` was trained on other weights than this {type(module).__name__} has in the "
            f"layers that it adapts. Load it into its own base model, `{base['name_or_path'] or base['identity']}`, or "
            "use `PeftModel.from_pretrained`, which does not ask."
        )


def _base_weights(module: nn.Module, names: Mapping[str, Any] | None = None) -> tuple[str, str]:
    """Dtype and digest of the frozen weights under the adapters; the bytes that a safetensors file would hold."""
    modules = dict(module.named_modules())
    digest, dtypes = hashlib.sha256(), set[str]()
    for name in sorted(names if names is not None else dict(adapted_layers(module))):
        layer = modules[name]
        weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(f"The layer `{name}` must have a weight to be adapted, but has none.")
        dtypes.add(str(weight.dtype))
        digest.update(name.encode() + b"\0")
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return "+".join(sorted(dtypes)), digest.hexdigest()


def _loaded(content: bytes, where: Path) -> dict[str, Tensor]:
    try:
        loaded: dict[str, Tensor] = load(content)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`{where}` must hold tensors in the safetensors format, but does not: {error!s:.300}."
        ) from None
    return loaded


def _check_tensors(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], folder: Path) -> None:
    if tensors.keys() != own.keys():
        raise ValueError(
            f"The adapter in `{folder}` must hold the tensors that its config describes, but differs in "
            f"{sorted(tensors.keys() ^ own.keys())[:4]}. Export the adapter again."
        )
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"`{name}` in `{folder}` must have the shape {tuple(tensor.shape)}, but has "
                f"{tuple(tensors[name].shape)}. Load it into its own base model."
            )
