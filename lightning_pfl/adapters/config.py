"""`CoLoraConfig`: everything that decides where Co-LoRA adapters go and how they start, as a PEFT config.

The user's part (rank, number of blocks, which modules) stays as it was given; `placement` and `base_identity` are
filled in when a model is first adapted and travel with a saved adapter, so that loading never has to decide again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from peft import PeftConfig
from torch import nn

from lightning_pfl.adapters._compat import PeftKey
from lightning_pfl.adapters.adaptable import adaptable, features
from lightning_pfl.adapters.gates import GatePolicy, StaticGate
from lightning_pfl.adapters.placement import Address, Placement, place
from lightning_pfl.adapters.stacks import blocks_of, inside
from lightning_pfl.functional.colora import seed_from

__all__ = ["KEY", "CoLoraConfig"]

KEY = PeftKey("COLORA")

_RESOLVED = ("placement", "base_identity")
_ABOUT_FILES = {field.name for field in fields(PeftConfig)}


@dataclass
class CoLoraConfig(PeftConfig):
    """Where Co-LoRA adapters go and how they start.

    Args:
        r: rank; the same for all clients that exchange P and Q.
        alpha: the scale of an adapter is alpha / r. None: twice the rank.
        num_blocks: into how many parts of equal relative depth each stack of blocks is cut; the last block of each
            part holds the layers whose P and Q are exchanged. 0: no layer does, all are conventional.
        target_modules: which layers are adapted: a regular expression for the whole name, or parts of names. None:
            every linear layer and every convolution of the blocks, except the head, convolutions with groups and those
            narrower than the rank.
        exclude_modules: which layers are not, in the same forms.
        blocks: name of the stack of blocks, or one per tower; ``stages.*.layers`` for one in stages. None: found from
            the module tree.
        private_layers: whether the layers outside those blocks are adapted too, conventionally.
        roles: names for what layers do in their block, asked before the built-in ones.
        dropout: probability that an adapter's input feature is dropped while training; one mask for both branches.
        seed: of the frozen bases and of conventional A.
        gate: how the global branch is weighed against the local one.
        global_branch: whether there is a global branch and a gate. Without: one adapter at full scale.
        placement: resolved: per adapted module ``tower/block/role``, or None for a conventional layer.
        base_identity: resolved: what the frozen bases depend on beside the seed, so that clients on the same base
            model have the same bases. Derived from the shape of the blocks; set it to tell apart, or to join, base
            models that this would not.

    Raises:
        ValueError: a rank, alpha, number of blocks or dropout that makes no sense.

    Example:
        >>> config = CoLoraConfig(r=8, alpha=16, num_blocks=2, target_modules=["q_proj", "v_proj"])
        >>> config.scale, config.peft_type
        (2.0, 'COLORA')
    """

    r: int = 32
    alpha: float | None = None
    num_blocks: int = 4
    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    blocks: str | dict[str, str] | None = None
    private_layers: bool = True
    roles: dict[str, str] = field(default_factory=dict)
    dropout: float = 0.0
    seed: int = 0
    gate: GatePolicy = field(default_factory=StaticGate)
    global_branch: bool = False
    placement: dict[str, str | None] | None = None
    base_identity: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = KEY
        if isinstance(self.gate, Mapping):  # read from JSON
            self.gate = GatePolicy.from_dict(self.gate)
        self.target_modules = _names(self.target_modules)
        self.exclude_modules = _names(self.exclude_modules)
        if self.target_modules == "all-linear":  # PEFT's word for what None means here
            self.target_modules = None
        if not (isinstance(self.r, int) and self.r > 0):
            raise ValueError(f"The rank `r` must be a positive integer, but is {self.r!r}.")
        if self.alpha is None:
            self.alpha = 2 * self.r
        if not (isinstance(self.alpha, (int, float)) and self.alpha > 0):
            raise ValueError(f"`alpha` must be positive (the scale is alpha / r), but is {self.alpha!r}.")
        if not (isinstance(self.num_blocks, int) and self.num_blocks >= 0):
            raise ValueError(f"`num_blocks` must be an integer and not negative, but is {self.num_blocks!r}.")
        if not (isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1):
            raise ValueError(f"`dropout` must lie in [0, 1), but is {self.dropout!r}.")
        if not isinstance(self.gate, GatePolicy):
            raise TypeError(f"`gate` must be a GatePolicy such as StaticGate(), but is {self.gate!r}.")

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        assert self.alpha is not None, "set when the config was made"
        return self.alpha / self.r

    def address(self, name: str) -> Address | None:
        """The address of an adapted module, None if it is conventional."""
        assert self.placement is not None, "the config is resolved before layers are made"
        text = self.placement.get(name)
        return None if text is None else Address.parse(text)

    def seed_of(self, *parts: str | int) -> int:
        """A seed that depends on (seed, base model, parts) and on nothing else, in particular not on the client."""
        assert self.base_identity is not None, "the config is resolved before layers are made"
        return seed_from(self.seed, self.base_identity, *parts)

    def resolved(self, module: nn.Module) -> tuple[CoLoraConfig, Placement]:
        """A copy that says where adapters go in a model.

        Args:
            module: the model, adapted already or not.

        Returns:
            The copy, and its placement with what was skipped. A placement that the config brings along is kept.

        Raises:
            ValueError: see `lightning_pfl.adapters.placement.place`; the config's own placement names layers that the
                model does not have; the rank is larger than a width of a Co-LoRA layer.
        """
        copy = CoLoraConfig(**{item.name: getattr(self, item.name) for item in fields(self)})
        if copy.placement is not None:
            if not copy.placement:
                raise ValueError(
                    "`placement` must name the layers that are adapted, but is empty. Leave it out to have it decided "
                    "from the model, or save the adapter again."
                )
            layers, skipped = adaptable(module)
            if missing := sorted(set(copy.placement) - set(layers)):
                raise ValueError(
                    f"The adapter was made for a model with the layers {missing[:4]} (and {max(0, len(missing) - 4)} "
                    f"more), which this {type(module).__name__} does not have. It has {list(layers)[:4]}, ... "
                    "Load it into its own base model, or make a config without `placement`."
                )
            copy.base_identity = copy.base_identity or _identity(module, {})
            addresses = {name: copy.address(name) for name in copy.placement}
            _check_rank(copy.r, addresses, layers)
            left = {name: "not in the adapter's placement" for name in layers if name not in addresses}
            return copy, Placement(addresses, {**skipped, **left})
        found = place(
            module,
            num_blocks=copy.num_blocks,
            target_modules=copy.target_modules,
            exclude_modules=copy.exclude_modules,
            blocks=copy.blocks,
            private_layers=copy.private_layers,
            roles=copy.roles,
            min_width=copy.r,
        )
        copy.placement = {name: None if address is None else str(address) for name, address in found.layers.items()}
        copy.base_identity = copy.base_identity or _identity(module, found.stacks)
        _check_rank(copy.r, found.layers, adaptable(module)[0])
        return copy, found

    def differences(self, other: CoLoraConfig) -> dict[str, tuple[Any, Any]]:
        """What another config asks for that this one, of a model that is adapted already, has not.

        What the other leaves open for a model to decide does not count, nor do a global branch and where files lie.
        """
        differ = {}
        for name in (item.name for item in fields(self)):
            ours, theirs = getattr(self, name), getattr(other, name)
            is_open = name in _RESOLVED and theirs is None
            if ours != theirs and not is_open and name != "global_branch" and name not in _ABOUT_FILES:
                differ[name] = (ours, theirs)
        return differ

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON can hold it."""
        written = {item.name: getattr(self, item.name) for item in fields(self)}
        return {**written, "gate": self.gate.to_dict(), "peft_type": str(KEY)}


def _names(patterns: str | Collection[str] | None) -> str | list[str] | None:
    """Sorted, so that configs compare equal and JSON can hold them."""
    return patterns if patterns is None or isinstance(patterns, str) else sorted(patterns)


def _check_rank(rank: int, addresses: Mapping[str, Address | None], layers: Mapping[str, nn.Module]) -> None:
    """Orthonormal bases need room; say so before any layer is replaced."""
    narrow = [n for n, address in addresses.items() if address is not None and min(features(layers[n])) < rank]
    if narrow:
        raise ValueError(
            f"A Co-LoRA layer must be at least as wide as the rank, {rank}, but `{narrow[0]}` maps "
            f"{' to '.join(map(str, features(layers[narrow[0]])))} features (and {len(narrow) - 1} more are too narrow)"
            ". Lower the rank or exclude them with exclude_modules."
        )


def _identity(module: nn.Module, stacks: Mapping[str, str]) -> str:
    """Equal for models whose blocks have the same kind, number and widths, wherever in a module they stand."""
    layers, _ = adaptable(module)
    facts, kinds = [], []
    for tower, stack in sorted(stacks.items()) or [("", "")]:
        root, *starred = re.split(r"\.?[^.]*\*", stack, maxsplit=1)
        blocks = tuple(map(inside, blocks_of(module, stack))) if stack else ()
        held = [name for name in layers if (name.startswith(blocks) if starred else name.startswith(inside(stack)))]
        within = [(name[len(inside(root)) :], *features(layers[name])) for name in held]
        kinds.append(type(module.get_submodule(blocks[0].removesuffix(".")) if blocks else module).__name__)
        facts.append((tower, kinds[-1], within))
    return f"{'+'.join(kinds)}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"
