"""Read and write the adapters of a module by the names under which clients exchange them.

Start at `shared_tensors`: what a client trained, split by who may mix it. P and Q of Co-LoRA layers go by
``tower/block/role/P`` and ``/Q``, which mean the same in every model; A and B of conventional layers go by the module's
own name, ``layers.0.fc1.A`` and ``.B``, and only to models of the same `architecture_of`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_pfl.adapters._compat import FloatBuffers
from lightning_pfl.adapters.injection import ADAPTER, SHARED, adapted_layers, config_of
from lightning_pfl.adapters.shared import exchanged
from lightning_pfl.types import FlatTensors, SharedTensors

__all__ = [
    "AdapterParameters",
    "adapter_parameters",
    "adapter_state",
    "architecture_of",
    "bases_of",
    "load_global",
    "load_local",
    "set_bases",
    "shared_tensors",
]


@dataclass(frozen=True, eq=False)
class AdapterParameters:
    """A module's trained adapter parameters, by name, in the three groups that want learning rates of their own.

    Attributes:
        pq: P and Q of Co-LoRA layers.
        ab: A and B of conventional layers.
        gates: of layers with a global branch; not to be decayed towards zero.
    """

    pq: Mapping[str, nn.Parameter]
    ab: Mapping[str, nn.Parameter]
    gates: Mapping[str, nn.Parameter]


def shared_tensors(module: nn.Module) -> SharedTensors:
    """Copy what a client trained and may share: its local branch L, or the `SHARED` adapter if there is one.

    Args:
        module: a module with adapters.

    Returns:
        float32 copies on the CPU.

    Raises:
        ValueError: the module holds no Co-LoRA adapters.

    Example:
        >>> from lightning_pfl.adapters import CoLoraConfig, inject
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1))
        >>> shared = shared_tensors(mlp)
        >>> shared.common.layout.names, shared.same_architecture.layout.names
        (('main/0/linear/P', 'main/0/linear/Q'), ('0.A', '0.B'))
    """
    config_of(module)
    common, own = _by_name(module, "local")
    return SharedTensors(FlatTensors.pack(common), FlatTensors.pack(own))


def load_local(module: nn.Module, shared: SharedTensors) -> None:
    """Write values into what `shared_tensors` copies, in place; a name that is absent keeps its value.

    Raises:
        ValueError: a name that the module does not have, or another shape than it has there.

    Example:
        >>> from lightning_pfl.adapters import CoLoraConfig, inject
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1))
        >>> load_local(mlp, SharedTensors(FlatTensors.pack({"main/0/linear/Q": torch.ones(2)})))
        >>> shared_tensors(mlp).common.unpack()["main/0/linear/Q"]
        tensor([1., 1.])
    """
    _load(module, shared, "local")


def load_global(module: nn.Module, shared: SharedTensors) -> None:
    """Write values into the frozen global branch G, in place; a name that is absent keeps its value.

    A and B of a conventional layer may come with another rank than the layer's own adapter has.

    Raises:
        ValueError: the module has no global branch; a name that it does not have, or another shape.

    Example:
        >>> from lightning_pfl.adapters import CoLoraConfig, inject
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1, global_branch=True))
        >>> load_global(mlp, SharedTensors(FlatTensors.pack({"main/0/linear/Q": torch.ones(2)})))
        >>> mlp[2].colora_global_Q["default"]
        tensor([1., 1.])
    """
    if not config_of(module).global_branch:
        raise ValueError(
            f"The adapters of the {type(module).__name__} have no global branch to load into. Call "
            "`add_global_branch(module)` first, or inject with global_branch=True."
        )
    _load(module, shared, "global")


def bases_of(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The frozen bases of the Co-LoRA layers by ``tower/block/role``: A ``[r, d_in]`` and B ``[d_out, r]``, copies.

    Raises:
        ValueError: the module holds no Co-LoRA adapters.

    Example:
        >>> from lightning_pfl.adapters import CoLoraConfig, inject
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1))
        >>> A, B = bases_of(mlp)["main/0/linear"]
        >>> A.shape, B.shape
        (torch.Size([2, 4]), torch.Size([4, 2]))
    """
    config_of(module)
    return {
        str(address): (layer.colora_basis_A[ADAPTER].clone(), layer.colora_basis_B[ADAPTER].clone())
        for _, layer in adapted_layers(module)
        if (address := layer.colora_address[ADAPTER]) is not None
    }


def set_bases(module: nn.Module, bases: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Replace frozen bases of Co-LoRA layers by aligned ones, in place.

    Args:
        module: a module with adapters.
        bases: by ``tower/block/role``: A ``[r, d_in]`` and B ``[d_out, r]``. A layer that is not named keeps its own.

    Raises:
        ValueError: an address that the module does not have, or another shape than it has there.

    Example:
        >>> from lightning_pfl.adapters import CoLoraConfig, inject
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1))
        >>> set_bases(mlp, {"main/0/linear": (torch.ones(2, 4), torch.ones(4, 2))})
        >>> bases_of(mlp)["main/0/linear"][0]
        tensor([[1., 1., 1., 1.],
                [1., 1., 1., 1.]])
    """
    layers = {str(layer.colora_address[ADAPTER]): layer for _, layer in adapted_layers(module)}
    layers.pop("None", None)
    for address, (A, B) in bases.items():
        if address not in layers:
            raise ValueError(
                f"The bases name the Co-LoRA layer `{address}`, which the {type(module).__name__} does not have. "
                f"It has {sorted(layers)}. Align models that were injected with the same num_blocks and target_modules."
            )
        for letter, new in (("A", A), ("B", B)):
            _copy(getattr(layers[address], f"colora_basis_{letter}")[ADAPTER], new, f"{address}/{letter}")
        layers[address].colora_aligned[ADAPTER].fill_(True)


def architecture_of(module: nn.Module) -> str:
    """Equal for modules whose conventional A and B may be mixed.

    Returns:
        A digest of the base model's identity, of the adapted modules' names, addresses and widths, and of rank, scale
        and seed.

    Raises:
        ValueError: the module holds no Co-LoRA adapters.

    Example:
        >>> from lightning_pfl.adapters import CoLoraConfig, inject
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1))
        >>> len(architecture_of(mlp))
        32
    """
    config = config_of(module)
    layers = [
        (name, str(layer.colora_address[ADAPTER]), layer.in_features, layer.out_features)
        for name, layer in adapted_layers(module)
    ]
    facts = (config.base_identity, layers, config.r, float(config.scale), config.seed)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def adapter_parameters(module: nn.Module) -> AdapterParameters:
    """The trained adapter parameters, by their names in ``module.named_parameters()``.

    Raises:
        ValueError: the module holds no Co-LoRA adapters.

    Example:
        >>> from lightning_pfl.adapters import CoLoraConfig, inject
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1))
        >>> list(adapter_parameters(mlp).pq)
        ['2.colora_P.default', '2.colora_Q.default']
    """
    config_of(module)
    groups: dict[str, dict[str, nn.Parameter]] = {"PQ": {}, "AB": {}, "gate": {}}
    for prefix, layer in adapted_layers(module):
        for group, found in groups.items():
            for part in [group] if group == "gate" else group:
                container = getattr(layer, f"colora_{part}")
                for adapter in (ADAPTER, SHARED):
                    if adapter in container:
                        found[f"{prefix}.colora_{part}.{adapter}"] = container[adapter]
    return AdapterParameters(groups["PQ"], groups["AB"], groups["gate"])


def adapter_state(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint that holds adapters only must hold, by the keys of ``module.state_dict()``.

    Frozen bases are left out, since injection rebuilds them from the seed, unless an alignment set them.

    Raises:
        ValueError: the module holds no Co-LoRA adapters.

    Example:
        >>> from lightning_pfl.adapters import CoLoraConfig, inject
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1))
        >>> list(adapter_state(mlp))
        ['0.colora_A.default', '0.colora_B.default', '2.colora_P.default', '2.colora_Q.default']
    """
    config_of(module)
    state: dict[str, Tensor] = {}
    for prefix, layer in adapted_layers(module):
        aligned = ADAPTER in layer.colora_aligned and bool(layer.colora_aligned[ADAPTER])
        for adapter in (ADAPTER, SHARED):
            for attribute, tensor in layer.state_of(adapter).items():
                if aligned or attribute not in layer.basis_names:
                    state[f"{prefix}.{attribute}.{adapter}"] = tensor.detach()
    return state


def _by_name(module: nn.Module, branch: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A branch's own tensors under their exchange names: common ones, and those bound to the architecture."""
    common: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    for name, layer in adapted_layers(module):
        address = layer.colora_address[ADAPTER]
        tensors = layer.local_tensors(exchanged(layer)) if branch == "local" else layer.global_tensors(ADAPTER)
        for letter, tensor in tensors.items():
            if address is None:
                own[f"{name}.{letter}"] = tensor
            else:
                assert f"{address}/{letter}" not in common, "placement gives every layer an address of its own"
                common[f"{address}/{letter}"] = tensor
    return common, own


def _load(module: nn.Module, shared: SharedTensors, branch: str) -> None:
    config_of(module)
    pairs: list[tuple[Tensor, Tensor, str]] = []
    longer = _of_other_rank(module, shared.same_architecture) if branch == "global" else {}
    for flat, own in zip((shared.common, shared.same_architecture), _by_name(module, branch), strict=True):
        for name, value in flat.unpack().items():
            if name not in own:
                raise ValueError(
                    f"The server sent `{name}`, which the {type(module).__name__} does not have. It has {sorted(own)}. "
                    "Clients that exchange P and Q need the same num_blocks and roles; A and B go only to clients of "
                    "the same architecture."
                )
            if name in longer:
                continue
            _check_shape(own[name], value, name)
            pairs.append((own[name], value, name))
    for target, value, name in pairs:  # after every check, so that nothing is written by halves
        _copy(target, value, name)
    for container, value in longer.values():
        container[ADAPTER] = value.to(container[ADAPTER], copy=True)


def _of_other_rank(module: nn.Module, flat: FlatTensors) -> dict[str, tuple[FloatBuffers, Tensor]]:
    """Pairs A and B that fit a layer's widths, but not its rank: where each belongs, and its value."""
    layers, tensors = dict(adapted_layers(module)), flat.unpack()
    found: dict[str, tuple[FloatBuffers, Tensor]] = {}
    for name, (a, b) in flat.layout.factors.items():
        layer = layers.get(name)
        if layer is None or layer.colora_address[ADAPTER] is not None:
            continue
        mine, A, B = layer.global_tensors(ADAPTER), tensors[a], tensors[b]
        widths = mine["A"].shape[1], mine["B"].shape[0]
        if (A.shape[1], B.shape[0]) == widths and A.shape != mine["A"].shape:
            found |= {a: (layer.colora_global_A, A), b: (layer.colora_global_B, B)}
    return found


def _check_shape(target: Tensor, value: Tensor, name: str) -> None:
    if target.shape != value.shape:
        raise ValueError(
            f"`{name}` must have the shape {tuple(target.shape)} that it has in this module, but came as "
            f"{tuple(value.shape)}. Ranks (and, for A and B, widths) must agree."
        )


@torch.no_grad()
def _copy(target: Tensor, value: Tensor, name: str) -> None:
    _check_shape(target, value, name)
    target.copy_(value)
