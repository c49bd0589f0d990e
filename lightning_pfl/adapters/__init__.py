"""Co-LoRA as a PEFT tuner: where adapters go, what a layer computes, and what clients exchange of it.

Start at `inject` (any module, in place) or at `CoLoraConfig` (with PEFT's own functions). Importing this package
registers the method with PEFT.
"""

from lightning_pfl.adapters.config import CoLoraConfig
from lightning_pfl.adapters.export import export_adapter
from lightning_pfl.adapters.gates import Additive, Combine, Convex, FixedGate, GatePolicy, InputGate, StaticGate
from lightning_pfl.adapters.injection import InjectionReport, add_global_branch, config_of, inject
from lightning_pfl.adapters.layer import CoLoraConv, CoLoraLayer, CoLoraLinear
from lightning_pfl.adapters.manifest import load_adapter
from lightning_pfl.adapters.merged import AsClass, DropBias, NoBiasPolicy, RefuseBias, export_merged, merged_state
from lightning_pfl.adapters.model import CoLoraModel
from lightning_pfl.adapters.placement import Address, Placement, place
from lightning_pfl.adapters.plain_lora import PlainLora, export_lora
from lightning_pfl.adapters.prompts import prompt_positions
from lightning_pfl.adapters.reference import from_reference, to_reference
from lightning_pfl.adapters.roles import DEFAULT_ROLES
from lightning_pfl.adapters.tensors import (
    AdapterParameters,
    adapter_parameters,
    adapter_state,
    architecture_of,
    bases_of,
    load_global,
    load_local,
    set_bases,
    shared_tensors,
)

__all__ = [
    "DEFAULT_ROLES",
    "AdapterParameters",
    "Additive",
    "Address",
    "AsClass",
    "CoLoraConfig",
    "CoLoraConv",
    "CoLoraLayer",
    "CoLoraLinear",
    "CoLoraModel",
    "Combine",
    "Convex",
    "DropBias",
    "FixedGate",
    "GatePolicy",
    "InjectionReport",
    "InputGate",
    "NoBiasPolicy",
    "Placement",
    "PlainLora",
    "RefuseBias",
    "StaticGate",
    "adapter_parameters",
    "adapter_state",
    "add_global_branch",
    "architecture_of",
    "bases_of",
    "config_of",
    "export_adapter",
    "export_lora",
    "export_merged",
    "from_reference",
    "inject",
    "load_adapter",
    "load_global",
    "load_local",
    "merged_state",
    "place",
    "prompt_positions",
    "set_bases",
    "shared_tensors",
    "to_reference",
]
