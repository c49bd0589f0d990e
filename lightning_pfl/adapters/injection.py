"""Put Co-LoRA adapters into any module, in place, and say where they went.

Start at `inject`. It is what PEFT's `inject_adapter_in_model` does, and beside that: idempotent, strict about another
config, able to leave chosen parameters of the model trainable, and it returns a report.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from lightning_pfl.adapters.config import CoLoraConfig
from lightning_pfl.adapters.layer import CoLoraLayer
from lightning_pfl.adapters.listening import connect
from lightning_pfl.adapters.model import CoLoraModel
from lightning_pfl.adapters.placement import Address
from lightning_pfl.adapters.statistics import hold

__all__ = [
    "ADAPTER",
    "SHARED",
    "InjectionReport",
    "adapted_layers",
    "add_global_branch",
    "config_of",
    "extend",
    "inject",
]

log = logging.getLogger(__name__)

ADAPTER = "default"
"""PEFT's name of the adapter that this package reads and writes: a client's own."""

SHARED = "shared"
"""PEFT's name of the second adapter, where a method has one (`lightning_pfl.adapters.shared`): the one exchanged."""


@dataclass(frozen=True)
class InjectionReport:
    """Where adapters went.

    Attributes:
        colora: address of every Co-LoRA layer, by module name.
        conventional: names of the conventional layers, private to models of this architecture.
        skipped: reason for every linear layer and convolution that holds no adapter, by module name.
        train_also: names of the model's own parameters that stay trainable.
        num_trainable: count of trained numbers, adapters and `train_also` together.
        own_words: names of the Co-LoRA layers whose role no map names: models that use other words have no partner for
            them.
        held: names of normalisation layers whose running statistics stay as they are, since their weights do.
    """

    colora: Mapping[str, Address]
    conventional: tuple[str, ...]
    skipped: Mapping[str, str]
    train_also: tuple[str, ...]
    num_trainable: int
    own_words: tuple[str, ...] = ()
    held: tuple[str, ...] = ()

    def __str__(self) -> str:
        blocks = sorted({(address.tower, address.block) for address in self.colora.values()})
        roles = sorted({address.role for address in self.colora.values()})
        reasons = {reason: [n for n, r in self.skipped.items() if r == reason] for reason in self.skipped.values()}
        lines = [
            f"{len(self.colora)} Co-LoRA layers in {len(blocks)} blocks, roles {', '.join(roles)}; "
            f"{len(self.conventional)} conventional layers; {self.num_trainable:,} trained numbers."
        ]
        lines += [f"  without adapter, {reason}: {_few(names)}" for reason, names in reasons.items()]
        if self.own_words:
            lines.append(f"  shared only among models with the same words (see `roles`): {_few(self.own_words)}")
        if self.held:
            lines.append(f"  running statistics frozen with the weights: {_few(self.held)}")
        if self.train_also:
            lines.append(f"  trained as well: {_few(self.train_also)}")
        return "\n".join(lines)


def inject(module: nn.Module, config: CoLoraConfig, *, train_also: Sequence[str] = ()) -> InjectionReport:
    """Give a module Co-LoRA adapters, in place; everything else in it is frozen.

    Args:
        module: any module, a whole LightningModule too. Its layers are replaced by ones that call them.
        config: what to inject; not changed.
        train_also: which of the module's own parameters stay trainable: names of parameters or of modules that hold
            them (``"head"``), with ``*`` and ``?`` if wanted.

    Returns:
        The report. A second call with the same config changes nothing and returns the same report.

    Raises:
        ValueError: no layer to adapt, or too few blocks; the module holds adapters of another config already;
            `train_also` names nothing.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> report = inject(mlp, CoLoraConfig(r=2, alpha=4, num_blocks=2), train_also=["4"])
        >>> {name: str(address) for name, address in report.colora.items()}
        {'0': 'main/0/linear', '2': 'main/1/linear'}
        >>> mlp[4].weight.requires_grad
        True
    """
    is_new = not any(True for _ in adapted_layers(module))
    if is_new:
        tuner = CoLoraModel(module, config, ADAPTER)
        placement = tuner.placement
        trained = _train_also(module, train_also)
    else:
        trained = extend(module, config, train_also=train_also)
        present = config_of(module)
        _, placement = present.resolved(module)
        if config.placement is None:  # the reasons for what was skipped, which a placement does not tell
            _, again = replace(present, placement=None).resolved(module)
            placement = again if again.layers == placement.layers else placement
    report = InjectionReport(
        colora={name: address for name, address in placement.layers.items() if address is not None},
        conventional=tuple(name for name, address in placement.layers.items() if address is None),
        skipped=dict(placement.skipped),
        train_also=trained,
        num_trainable=sum(p.numel() for p in module.parameters() if p.requires_grad),
        own_words=placement.own_words,
        held=tuple(hold(module)),
    )
    if is_new:
        log.info("Adapters in %s: %s", type(module).__name__, report)
    return report


def extend(module: nn.Module, config: CoLoraConfig, *, train_also: Sequence[str] = ()) -> tuple[str, ...]:
    """What `inject` does to a module that holds adapters already, without a report, which takes longer than all of it.

    Args:
        module: with adapters.
        config: that of its adapters; it may ask for a global branch that they do not have yet.
        train_also: as of `inject`.

    Returns:
        Names of the model's own parameters that stay trainable.

    Raises:
        ValueError: the module holds no adapters, or adapters of another config; `train_also` names nothing.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1))
        >>> extend(mlp, CoLoraConfig(r=2, num_blocks=1), train_also=["4"])
        ('4.weight', '4.bias')
    """
    if differences := config_of(module).differences(config):
        told = ", ".join(f"{name}: {old!r} there, {new!r} asked for" for name, (old, new) in differences.items())
        raise ValueError(
            f"The {type(module).__name__} holds Co-LoRA adapters of another config already ({told}). "
            "Use the same config, or start from a module without adapters."
        )
    if config.global_branch:
        add_global_branch(module)
    trained = _train_also(module, train_also)
    hold(module)
    return trained


def add_global_branch(module: nn.Module) -> None:
    """Give every adapter a frozen global branch, equal to its local one, and a gate; a second time does nothing.

    Raises:
        ValueError: the module holds no Co-LoRA adapters.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1))
        >>> add_global_branch(mlp)
        >>> [name for name, _ in mlp[2].named_parameters() if "gate" in name]
        ['colora_gate.default']
    """
    config = config_of(module)
    if config.gate.reads_input:
        connect(module)
    config.global_branch = True
    for _, layer in adapted_layers(module):
        layer.add_global_branch(ADAPTER)


def adapted_layers(module: nn.Module) -> Iterator[tuple[str, CoLoraLayer]]:
    """The layers that hold the adapter, with their names, in module order."""
    for name, child in module.named_modules():
        if isinstance(child, CoLoraLayer) and ADAPTER in child.colora_address:
            yield name, child


def config_of(module: nn.Module) -> CoLoraConfig:
    """The config of the adapters in a module (or in a part of the module that was injected into).

    Raises:
        ValueError: the module holds no Co-LoRA adapters.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1))
        >>> config_of(mlp).r
        2
    """
    for _, layer in adapted_layers(module):
        return layer.colora_config[ADAPTER]
    raise ValueError(
        f"The {type(module).__name__} holds no Co-LoRA adapters. Call `inject(module, config)` first, or put the "
        "CoLoRA callback into the Trainer."
    )


def _train_also(module: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Mark the model's own parameters of these names as trained."""
    inside = tuple(f"{name}." for name, _ in adapted_layers(module))
    own = {name: p for name, p in module.named_parameters() if not name.startswith(inside)}
    found: list[str] = []
    for pattern in patterns:
        fits = [
            name for name in own if fnmatchcase(name, pattern) or any(fnmatchcase(m, pattern) for m in _holders(name))
        ]
        if not fits:
            raise ValueError(
                f"`train_also` names `{pattern}`, but no parameter outside the adapted layers has that name or lies in "
                f"a module of that name. The {type(module).__name__} consists of: "
                f"{_few(sorted({name.split('.')[0] for name in own}))}."
            )
        found += [name for name in fits if name not in found]
    for name in found:
        own[name].requires_grad_(True)
    return tuple(found)


def _holders(name: str) -> list[str]:
    """``a.b.weight`` lies in ``a.b`` and ``a``."""
    words = name.split(".")
    return [".".join(words[:stop]) for stop in range(1, len(words))]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
