"""Write a module's adapter as a standard PEFT folder, also when PEFT itself never wrapped the module.

Start at `export_adapter`. The folder holds JSON and safetensors only, so reading one that came from elsewhere runs no
code, and it holds everything that the adapter's output depends on: both branches, the gate and the frozen bases.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_pfl.adapters._compat import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from lightning_pfl.adapters.config import CoLoraConfig
from lightning_pfl.adapters.injection import ADAPTER, adapted_layers, config_of
from lightning_pfl.adapters.manifest import write_manifest
from lightning_pfl.adapters.model import CoLoraModel

__all__ = ["export_adapter"]


def export_adapter(
    module: nn.Module,
    path: str | Path,
    *,
    base_model_name_or_path: str | None = None,
    client: str | None = None,
    round: int | None = None,
) -> None:
    """Write the adapter of a module into a folder that ``PeftModel.from_pretrained(base, path)`` reads.

    So does `load_adapter`, which also checks by the folder's manifest that nothing is damaged and that the base model
    is the one the adapter was trained on.

    Args:
        module: a module with adapters. The folder fits a base model of the same structure, so for a model that stands
            inside a LightningModule pass the inner one (``export_adapter(lit.model, path)``).
        path: the folder; made if it is not there.
        base_model_name_or_path: what the folder says of the base model; None: what the module knows of it.
        client: whose adapter the manifest says it is.
        round: of which round the manifest says it is, from 0.

    Raises:
        ValueError: the module holds no Co-LoRA adapters.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_pfl.adapters import inject
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1))
        >>> with TemporaryDirectory() as folder:
        ...     export_adapter(mlp, folder)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['adapter_config.json', 'adapter_manifest.json', 'adapter_model.safetensors']
    """
    if isinstance(module, PeftModel):
        module = module.base_model
    if isinstance(module, CoLoraModel):
        module = module.model
    config = config_of(module)
    values = {item.name: getattr(config, item.name) for item in fields(config)}
    values["placement"] = {
        name: None if (address := layer.colora_address[ADAPTER]) is None else str(address)
        for name, layer in adapted_layers(module)
    }
    values["inference_mode"] = True
    values["base_model_name_or_path"] = (
        base_model_name_or_path or config.base_model_name_or_path or getattr(module, "name_or_path", None) or None
    )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(CoLoraConfig(**values).to_dict(), indent=2, sort_keys=True))
    save_file(_tensors(module), folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    write_manifest(module, folder, client=client, round=round)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for prefix, layer in adapted_layers(module):
        for attribute, tensor in layer.state_of(ADAPTER).items():
            tensors[f"base_model.model.{prefix}.{attribute}"] = tensor.detach().cpu().contiguous()
    return tensors
