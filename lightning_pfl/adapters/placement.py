"""Where adapters go: which layers of a model become Co-LoRA layers, under which address, and which stay private.

Start at `place`. Clients whose models differ in depth meet in blocks: a stack of n blocks is cut into K parts of about
equal relative depth, and the last block of each part holds the Co-LoRA layers (formula in `last_blocks`). A Co-LoRA
layer is known by its `Address`, tower / block / role, where block counts the parts, from 0; every other adapted layer
is conventional and private to its architecture.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_pfl.adapters._compat import BaseTunerLayer, Conv1D
from lightning_pfl.adapters.roles import role_of

__all__ = ["MAIN", "Address", "Placement", "adaptable", "last_blocks", "matches", "place"]

log = logging.getLogger(__name__)

MAIN = "main"
"""Name of the tower when the user does not name towers."""


@dataclass(frozen=True, order=True)
class Address:
    """What a Co-LoRA layer is called in every model.

    Attributes:
        tower: which stack of blocks; `MAIN` when there is one.
        block: which part of the stack, from 0 to K - 1.
        role: what the layer does in its block.

    Example:
        >>> str(Address("main", 2, "q")), Address.parse("main/2/q").block
        ('main/2/q', 2)
    """

    tower: str
    block: int
    role: str

    def __post_init__(self) -> None:
        if "/" in self.tower or "/" in self.role:
            raise ValueError(f"Towers and roles must not contain `/`, but are `{self.tower}` and `{self.role}`.")

    def __str__(self) -> str:
        return f"{self.tower}/{self.block}/{self.role}"

    @staticmethod
    def parse(text: str) -> Address:
        """Read what `str` wrote."""
        tower, block, role = text.split("/")
        return Address(tower, int(block), role)


@dataclass(frozen=True)
class Placement:
    """Which layers are adapted, and how.

    Attributes:
        layers: per name of an adapted layer, in module order, its address; None for a conventional layer.
        skipped: per name of a layer that could have been adapted and is not, the reason.
        stacks: per tower, the name of its stack in the model.
    """

    layers: Mapping[str, Address | None]
    skipped: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, str] = field(default_factory=dict)


def place(
    module: nn.Module,
    *,
    num_blocks: int,
    target_modules: str | Collection[str] | None = None,
    exclude_modules: str | Collection[str] | None = None,
    blocks: str | Mapping[str, str] | None = None,
    private_layers: bool = True,
    roles: Mapping[str, str] | None = None,
) -> Placement:
    """Decide where adapters go in a model.

    Args:
        module: any module; nothing is changed.
        num_blocks: K, in how many parts each stack is cut.
        target_modules: which layers are adapted: a regular expression for the whole name, or parts of names (a layer's
            own, ``"q_proj"``, or that of a module that contains it). None: every linear layer except the head.
        exclude_modules: which layers are not, in the same forms.
        blocks: name of the stack (its end is enough), or one name per tower. None: of the stacks that hold adapted
            layers, the outermost one with the most of them.
        private_layers: whether layers outside the K blocks are adapted too, conventionally.
        roles: see `role_of`.

    Returns:
        The placement.

    Raises:
        ValueError: nothing matches, no stack or several equal ones, more parts than blocks.

    Example:
        >>> block = lambda: nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)})
        >>> model = nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(4)), "head": nn.Linear(4, 2)})
        >>> found = place(model, num_blocks=2)
        >>> {name: str(address) for name, address in found.layers.items() if address}  # doctest: +NORMALIZE_WHITESPACE
        {'layers.1.fc1': 'main/0/fc1', 'layers.1.fc2': 'main/0/fc2',
         'layers.3.fc1': 'main/1/fc1', 'layers.3.fc2': 'main/1/fc2'}
        >>> found.skipped
        {'head': 'it is the head; name it in target_modules to adapt it'}
    """
    layers, skipped = adaptable(module)
    found = list(layers)
    if target_modules is None:
        for name in _heads(module, layers):
            skipped[name] = "it is the head; name it in target_modules to adapt it"
            log.info("No adapter goes into `%s`: %s.", name, skipped[name])
            del layers[name]
    for name in list(layers):
        if matches(name, exclude_modules):
            skipped[name] = "exclude_modules"
        elif target_modules is not None and not matches(name, target_modules):
            skipped[name] = "not among target_modules"
        else:
            continue
        del layers[name]
    if not layers:
        raise ValueError(
            f"No layer is left to adapt with target_modules={target_modules!r} and exclude_modules={exclude_modules!r}."
            f" Linear layers that were there: {found or 'none'}. Name one of these in target_modules."
        )
    stacks = _stacks(module, layers, blocks)
    addresses: dict[str, Address | None] = dict.fromkeys(layers)
    for tower, stack in stacks.items():
        addresses.update(_addresses(tower, stack, layers, num_blocks, roles))
    if not private_layers:
        for name in [name for name, address in addresses.items() if address is None]:
            skipped[name] = "outside the shared blocks, and private_layers is False"
            del addresses[name]
    return Placement(addresses, skipped, {tower: stack.name for tower, stack in stacks.items()})


def last_blocks(depth: int, num_blocks: int) -> list[int]:
    """The last block of each of K parts of a stack; the last part takes what is left over.

    Args:
        depth: n, how many blocks the stack has.
        num_blocks: K, 1 <= K <= n.

    Returns:
        ``k * floor(n / K) - 1`` for k = 1 .. K - 1, then ``n - 1``; from 0.

    Raises:
        ValueError: K outside 1 .. n.

    Source:
        The reference implementation's block-last layers (arXiv:2506.11024, section 3.2).

    Example:
        >>> last_blocks(16, 4), last_blocks(30, 4), last_blocks(5, 5)
        ([3, 7, 11, 15], [6, 13, 20, 29], [0, 1, 2, 3, 4])
    """
    if not 1 <= num_blocks <= depth:
        raise ValueError(
            f"`num_blocks` must lie between 1 and the number of blocks of the model, {depth}, but is {num_blocks}. "
            "All clients that exchange P and Q need the same num_blocks, so choose one that the shallowest model has."
        )
    step = depth // num_blocks
    return [k * step - 1 for k in range(1, num_blocks)] + [depth - 1]


def adaptable(module: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """All layers that can hold an adapter, by name, and those of their kind that cannot, with the reason.

    Example:
        >>> layers, skipped = adaptable(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.MultiheadAttention(4, 2)))
        >>> list(layers), skipped
        (['0'], {'2.out_proj': "torch's MultiheadAttention reads its weight without calling the layer"})
    """
    named = Counter(id(child) for _, child in _all_children(module))
    layers: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    hidden: list[str] = []  # what lies under these names is somebody's inside
    for name, child in module.named_modules():
        if any(name.startswith(prefix) for prefix in hidden):
            continue
        if isinstance(child, BaseTunerLayer):
            hidden.append(f"{name}.")
            base = child.get_base_layer()
            if getattr(child, "is_colora", False):
                layers[name] = base
            else:
                skipped[name] = f"it already holds an adapter of another PEFT method ({type(child).__name__})"
        elif isinstance(child, nn.MultiheadAttention):
            hidden.append(f"{name}.")
            skipped[f"{name}.out_proj"] = "torch's MultiheadAttention reads its weight without calling the layer"
        elif isinstance(child, (nn.Linear, Conv1D)) and name:
            if named[id(child)] > 1:
                skipped[name] = "it stands in several places of the model, and an adapter would come into one of them"
            else:
                layers[name] = child
    return layers, skipped


def _all_children(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Every pair of a module and a child of its own, each module visited once."""
    for parent in module.modules():
        for child in parent._modules.values():
            if child is not None:
                yield parent, child


def matches(name: str, patterns: str | Collection[str] | None) -> bool:
    """Whether a name fits a regular expression as a whole, or holds one of the given names as whole words.

    Example:
        >>> matches("model.vision.layers.0.q_proj", ["vision"]), matches("model.layers.10.q_proj", ["layers.1"])
        (True, False)
    """
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(f".{pattern}." in f".{name}." for pattern in patterns)


@dataclass(frozen=True)
class _Stack:
    name: str
    blocks: tuple[tuple[str, int], ...]  # names of the children that hold adapted layers, and how many each holds

    @property
    def num_layers(self) -> int:
        return sum(count for _, count in self.blocks)


def _stacks(
    module: nn.Module, layers: Mapping[str, nn.Module], blocks: str | Mapping[str, str] | None
) -> dict[str, _Stack]:
    """The stack of each tower."""
    if blocks is not None:
        wanted = {MAIN: blocks} if isinstance(blocks, str) else dict(blocks)
        return {tower: _named_stack(module, layers, path) for tower, path in wanted.items()}
    candidates = [stack for stack in _every_stack(module, layers) if len(stack.blocks) > 1] or [
        stack for stack in _every_stack(module, layers) if stack.blocks
    ]
    if not candidates:
        whole = _Stack("", (("", len(layers)),))
        log.info("The model has no stack of blocks (no ModuleList or Sequential): the whole of it counts as one block.")
        return {MAIN: whole}
    most = max(stack.num_layers for stack in candidates)
    best: list[_Stack] = []
    for stack in candidates:  # parents come before their children, so the first of a nest is the outermost
        if stack.num_layers == most and not any(stack.name.startswith(_inside(outer.name)) for outer in best):
            best.append(stack)
    if len(best) > 1:
        names = [stack.name for stack in best]
        raise ValueError(
            f"The model has several stacks of blocks with {most} adapted layers each: {names}. Say which one clients "
            f"share with blocks={names[0]!r}, or share several with blocks={{'tower_a': {names[0]!r}, "
            f"'tower_b': {names[1]!r}}} (the same tower names on all clients), or leave one out with exclude_modules."
        )
    return {MAIN: best[0]}


def _every_stack(module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[_Stack]:
    """Every ModuleList, and every Sequential whose adapted children are of one kind (others are pipelines)."""
    for name, child in module.named_modules():
        if not isinstance(child, (nn.ModuleList, nn.Sequential)):
            continue
        stack = _stack(name, child, layers)
        kinds = {type(module.get_submodule(block)) for block, _ in stack.blocks}
        if isinstance(child, nn.ModuleList) or len(kinds) == 1:
            yield stack


def _stack(name: str, child: nn.Module, layers: Mapping[str, nn.Module]) -> _Stack:
    prefix = _inside(name)
    counts = Counter(layer[len(prefix) :].split(".", 1)[0] for layer in layers if layer.startswith(prefix))
    return _Stack(name, tuple((prefix + key, counts[key]) for key, _ in child.named_children() if counts[key]))


def _named_stack(module: nn.Module, layers: Mapping[str, nn.Module], path: str) -> _Stack:
    found = [name for name, _ in module.named_modules() if name == path or name.endswith(f".{path}")]
    stacks = [stack for name in found if (stack := _stack(name, module.get_submodule(name), layers)).blocks]
    if len(stacks) != 1:
        there = [stack.name for stack in _every_stack(module, layers) if stack.blocks]
        raise ValueError(
            f"`blocks` must name one stack that holds adapted layers, but `{path}` fits "
            f"{[stack.name for stack in stacks] or 'none'}. Stacks that were there: {there or 'none'}."
        )
    return stacks[0]


def _addresses(
    tower: str, stack: _Stack, layers: Mapping[str, nn.Module], num_blocks: int, roles: Mapping[str, str] | None
) -> dict[str, Address]:
    addresses: dict[str, Address] = {}
    told: set[str] = set()
    for part, index in enumerate(last_blocks(len(stack.blocks), num_blocks)):
        block = stack.blocks[index][0]
        inside = {name: _path(block, name) for name in layers if name == block or name.startswith(_inside(block))}
        named = {name: role_of(path, roles) for name, path in inside.items()}
        counts = Counter(named.values())
        for name, role in named.items():
            # several layers of one role (experts, two attentions) are told apart by their path in the block
            addresses[name] = Address(tower, part, inside[name] if counts[role] > 1 else role)
            if counts[role] > 1 and role not in told:
                told.add(role)
                log.warning(
                    "Role `%s` occurs %d times in block `%s`; these layers are known by their paths there, such as "
                    "`%s`. Models of other families find no partner for them unless `roles` gives each its own name.",
                    role,
                    counts[role],
                    block,
                    inside[name],
                )
    return addresses


def _path(block: str, name: str) -> str:
    return name[len(_inside(block)) :]


def _inside(name: str) -> str:
    return f"{name}." if name else ""


def _heads(module: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Output embeddings of any model inside, and the last linear layer unless it is a part of a repeated block."""
    outputs = [
        out
        for child in module.modules()
        if callable(getattr(child, "get_output_embeddings", None)) and (out := _output_embeddings(child)) is not None
    ]
    heads = [name for name, layer in layers.items() if any(layer is out for out in outputs)]
    last = next(reversed(list(layers)), None)
    if last is not None and last not in heads and len(layers) > 1 and not _in_block(module, layers, last):
        heads.append(last)
    return heads


def _output_embeddings(child: Any) -> nn.Module | None:
    try:
        found = child.get_output_embeddings()
    except (NotImplementedError, AttributeError):  # transformers raises either for a model without them
        return None
    layer = getattr(found, "base_layer", found)
    return layer if isinstance(layer, nn.Module) else None


def _in_block(module: nn.Module, layers: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a layer is a part of an element of a ModuleList, or has its like in another block of a Sequential."""
    for stack in _every_stack(module, layers):
        if not name.startswith(_inside(stack.name)):
            continue
        own = next(block for block, _ in stack.blocks if name == block or name.startswith(f"{block}."))
        path = _path(own, name)
        if path and isinstance(module.get_submodule(stack.name), nn.ModuleList):
            return True
        if path and any(f"{block}.{path}" in layers for block, _ in stack.blocks if block != own):
            return True
    return False
