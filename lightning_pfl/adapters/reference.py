r"""Tensors in the layout of the paper's research code, and back.

Start at `from_reference`. That code keeps, per adapted linear, two adapters beside each other and a gate:

    ``<layer>.lora1_A.default.weight`` ``[r, d_in]``, ``lora1_B.default.weight`` ``[d_out, r]``   G, the global adapter
    ``<layer>.lora1_P.default`` ``[r, r]``, ``lora1_Q.default`` ``[1, r]``                        of G
    ``<layer>.lora2_...``                                                                        L, the local adapter
    ``<layer>.lora_w_gate.default`` ``[d_in, 1]``                                                one for both

It multiplies rows, :math:`z P`, where we and the paper multiply columns, :math:`P z`: its P is our P transposed. Files
with one adapter (``lora_A``, as its aligned initialisations are) count for both. Names are matched with or without
``.default``, ``.weight`` and a prefix such as ``base_model.model.``, since its files differ in these.

What does not carry over:

- Its gate is :math:`\sigma(w \cdot \bar x)` with the mean over *all* positions, and noise while training; `InputGate`
  takes the mean over the prompt, without noise. Weights carry over, and give the same beta where the whole input is the
  prompt. The noise's weights are never trained there and are left out.
- `StaticGate` is a number and not a weight: it carries over where it is 0 (beta 0.5), and is refused elsewhere.
- Its layers outside the shared blocks hold P and Q that take no part in anything; they are left out.
- alpha, and which layers are in shared blocks, stand in no tensor: inject with the run's settings first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_pfl.adapters.gates import Convex, InputGate
from lightning_pfl.adapters.injection import ADAPTER, adapted_layers, config_of
from lightning_pfl.adapters.layer import CoLoraLayer

__all__ = ["from_reference", "to_reference"]

_NAME = re.compile(
    r"(?:(?P<layer>.*)\.)?lora(?P<branch>[12]?)_(?P<letter>[ABPQ]|w_gate|w_noise)(?:\.default)?(?:\.weight)?"
)
_SAME = 1e-3  # A and B of G and L are stored in bfloat16 in some files


def to_reference(module: nn.Module) -> dict[str, Tensor]:
    """A module's adapters in the research code's layout.

    Args:
        module: with adapters; left alone. Without a global branch G is written equal to L with an even gate, which
            computes the same.

    Returns:
        Copies on the CPU, by ``<layer>.lora1_A.default.weight`` and so on, layers as the module calls them.

    Raises:
        ValueError: no adapters; a static gate that is not 0, or branches that are added instead of mixed, which that
            layout has no place for.

    Example:
        >>> from lightning_pfl.adapters import CoLoraConfig, inject
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1))
        >>> state = to_reference(mlp)
        >>> state["2.lora2_Q.default"].shape, state["2.lora_w_gate.default"].shape
        (torch.Size([1, 2]), torch.Size([4, 1]))
    """
    config = config_of(module)
    if config.global_branch and not isinstance(config.gate.combine, Convex):
        raise ValueError(
            f"The adapters add their branches ({config.gate.combine}), and the research code only knows "
            "beta G + (1 - beta) L. Train with the default `Convex()`, or write the adapter with `export_adapter`."
        )
    state: dict[str, Tensor] = {}
    for name, layer in adapted_layers(module):
        gate = _gate_weight(name, layer)
        is_gated = layer.has_global_branch(ADAPTER)
        tensors = {2: layer.local_tensors(ADAPTER)}
        tensors[1] = layer.global_tensors(ADAPTER) if is_gated else tensors[2]
        for branch in (1, 2):
            held = dict(tensors[branch])
            if "P" in held:
                held |= {"A": layer.colora_basis_A[ADAPTER], "B": layer.colora_basis_B[ADAPTER]}
                state[f"{name}.lora{branch}_P.default"] = held.pop("P").T
                state[f"{name}.lora{branch}_Q.default"] = held.pop("Q")[None]
            for letter, tensor in held.items():
                state[f"{name}.lora{branch}_{letter}.default.weight"] = tensor
        state[f"{name}.lora_w_gate.default"] = gate
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}


@torch.no_grad()
def from_reference(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Read adapters in the research code's layout into a module, in place.

    Args:
        module: with adapters of the same rank, alpha, blocks and target modules as the run that wrote the state, and a
            global branch unless G and L are the same in the state. For its gates, inject with ``gate=InputGate()``.
        state: by the names of that layout; see the head of this file. Nothing else may be in it.

    Raises:
        ValueError: a name that is none of that layout; layers that the module or the state lacks; other shapes; A or
            B of a shared layer that differ between G and L; a G without a place; a gate weight for a static gate.

    Example:
        >>> from lightning_pfl.adapters import CoLoraConfig, inject
        >>> one, two = (
        ...     nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2)
        ... )
        >>> for mlp in (one, two):
        ...     _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1))
        >>> one[2].colora_Q["default"].data.fill_(3.0)
        tensor([3., 3.])
        >>> from_reference(two, to_reference(one))
        >>> two[2].colora_Q["default"].data
        tensor([3., 3.])
    """
    config_of(module)
    layers: dict[str, CoLoraLayer] = dict(adapted_layers(module))
    found = _assigned(_read(state), layers, type(module).__name__)
    pairs: list[tuple[Tensor, Tensor]] = []
    bases: list[CoLoraLayer] = []
    for name, layer in layers.items():
        pairs += _targets(name, layer, found[name])
        if layer.colora_address[ADAPTER] is not None:
            bases.append(layer)
    for target, value in pairs:  # after every check, so that nothing is written by halves
        target.copy_(value)
    for layer in bases:
        layer.colora_aligned[ADAPTER].fill_(True)


@dataclass
class _Read:
    """What a state says of one layer: tensors by branch and letter, and the gate."""

    branches: dict[int, dict[str, Tensor]] = field(default_factory=lambda: {1: {}, 2: {}})
    gate: Tensor | None = None


def _read(state: Mapping[str, Tensor]) -> dict[str, _Read]:
    read: dict[str, _Read] = {}
    for key, tensor in state.items():
        match = _NAME.fullmatch(key)
        if match is None:
            raise ValueError(
                f"`{key}` is no name of the research code's adapters, which are called like "
                "`<layer>.lora1_A.default.weight`. Pass the adapters' tensors alone."
            )
        one = read.setdefault(match["layer"] or "", _Read())
        if match["letter"] == "w_gate":
            one.gate = tensor
        elif match["letter"] != "w_noise":
            for branch in (1, 2) if not match["branch"] else (int(match["branch"]),):
                one.branches[branch][match["letter"]] = tensor
    return read


def _assigned(read: dict[str, _Read], layers: Mapping[str, CoLoraLayer], what: str) -> dict[str, _Read]:
    """What was read, by the module's own names for layers, whichever of the two has a longer prefix."""
    found: dict[str, _Read] = {}
    for theirs, one in read.items():
        fits = [ours for ours in layers if ours == theirs or theirs.endswith(f".{ours}") or ours.endswith(f".{theirs}")]
        fits = [ours for ours in fits if ours == theirs] or fits
        if len(fits) != 1 or fits[0] in found:
            raise ValueError(
                f"The layer `{theirs}` of the state fits {fits or 'none'} of the {what}'s adapted layers. Inject with "
                "the run's target modules, and pass the part of the model that the state is of."
            )
        found[fits[0]] = one
    if missing := [name for name in layers if name not in found]:
        raise ValueError(
            f"The state lacks {missing[:3]} (and {max(0, len(missing) - 3)} more) of the {what}'s adapted layers. "
            "Inject with the run's target modules."
        )
    return found


def _targets(name: str, layer: CoLoraLayer, one: _Read) -> list[tuple[Tensor, Tensor]]:
    """Where each tensor of a layer goes, checked."""
    is_gated, is_shared = layer.has_global_branch(ADAPTER), layer.colora_address[ADAPTER] is not None
    both = {letter: _taken(name, one, letter) for letter in ("ABPQ" if is_shared else "AB")}
    if is_shared:
        both["P"] = tuple(tensor.T for tensor in both["P"])
        both["Q"] = tuple(tensor.reshape(-1) for tensor in both["Q"])
        for letter in "AB":
            if not torch.allclose(both[letter][0].float(), both[letter][1].float(), atol=_SAME, rtol=_SAME):
                raise ValueError(
                    f"{letter} of `{name}` must be the same in lora1 and lora2, as it is frozen in a layer of a shared "
                    "block, but is not: in the run that wrote the state this was no such layer. Inject with its "
                    "num_blocks."
                )
    pairs: list[tuple[Tensor, Tensor]] = []
    if is_shared:
        pairs += [(layer.colora_basis_A[ADAPTER], both["A"][1]), (layer.colora_basis_B[ADAPTER], both["B"][1])]
    pairs += [(tensor, both[letter][1]) for letter, tensor in layer.local_tensors(ADAPTER).items()]
    if is_gated:
        pairs += [(tensor, both[letter][0]) for letter, tensor in layer.global_tensors(ADAPTER).items()]
        pairs.append((layer.colora_gate[ADAPTER], _gate(name, layer, one.gate)))
    elif any(not torch.equal(*both[letter]) for letter in layer.local_tensors(ADAPTER)):
        raise ValueError(
            f"The state has a global adapter (lora1) of its own at `{name}`, and the module has no global branch to "
            "hold it. Inject with CoLoraConfig(global_branch=True, gate=InputGate())."
        )
    for target, value in pairs:
        if target.shape != value.shape:
            raise ValueError(
                f"A tensor of `{name}` must have the shape {tuple(target.shape)}, but came as {tuple(value.shape)}. "
                "Inject with the rank of the run that wrote the state."
            )
    return pairs


def _taken(name: str, one: _Read, letter: str) -> tuple[Tensor, ...]:
    """A tensor of G and of L."""
    absent = [f"lora{branch}_{letter}" for branch in (1, 2) if letter not in one.branches[branch]]
    if absent:
        raise ValueError(f"The state has no {' and no '.join(absent)} at `{name}`. Pass both adapters whole.")
    return one.branches[1][letter], one.branches[2][letter]


def _gate(name: str, layer: CoLoraLayer, weight: Tensor | None) -> Tensor:
    """A layer's gate parameter."""
    mine = layer.colora_gate[ADAPTER]
    if isinstance(layer.colora_config[ADAPTER].gate, InputGate):
        return torch.zeros_like(mine) if weight is None else weight.reshape(-1)
    if weight is not None and bool(weight.any()):
        raise ValueError(
            f"The gate of `{name}` is a weight on the input, and {layer.colora_config[ADAPTER].gate} is none. Inject "
            "with gate=InputGate()."
        )
    return torch.zeros_like(mine)


def _gate_weight(name: str, layer: CoLoraLayer) -> Tensor:
    """A layer's gate as ``[d_in, 1]``."""
    like = next(iter(layer.local_tensors(ADAPTER).values()))
    zero = torch.zeros(layer.in_features, 1, dtype=like.dtype)
    if not layer.has_global_branch(ADAPTER):
        return zero
    mine: Tensor = layer.colora_gate[ADAPTER]
    if isinstance(layer.colora_config[ADAPTER].gate, InputGate):
        return mine[:, None]
    if bool(mine.any()):
        raise ValueError(
            f"The gate of `{name}` is the number {mine.mean().item():.3g} whatever the input, and the research code's "
            "is a weight on the input, which can say only 0 of that kind. Train with gate=InputGate(), or write the "
            "adapter with `export_adapter`."
        )
    return zero
