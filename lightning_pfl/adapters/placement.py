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
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_pfl.adapters.adaptable import adaptable, features, is_convolution
from lightning_pfl.adapters.roles import known_role, role_of
from lightning_pfl.adapters.stacks import MAIN, Stack, every_stack, find_stacks, inside, output_embeddings, path_in

__all__ = ["MAIN", "Address", "Placement", "last_blocks", "matches", "place"]

log = logging.getLogger(__name__)


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
        stacks: per tower, the name of its stack in the model; a pattern for one that is cut into stages.
        own_words: names of Co-LoRA layers whose role no map names, so that they go by words of their own model and find
            partners only in models that use the same.
    """

    layers: Mapping[str, Address | None]
    skipped: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, str] = field(default_factory=dict)
    own_words: tuple[str, ...] = ()


def place(
    module: nn.Module,
    *,
    num_blocks: int,
    target_modules: str | Collection[str] | None = None,
    exclude_modules: str | Collection[str] | None = None,
    blocks: str | Mapping[str, str] | None = None,
    private_layers: bool = True,
    roles: Mapping[str, str] | None = None,
    min_width: int = 1,
) -> Placement:
    """Decide where adapters go in a model.

    Args:
        module: any module; nothing is changed.
        num_blocks: K, in how many parts each stack is cut; 0: no layer becomes a Co-LoRA layer.
        target_modules: which layers are adapted: a regular expression for the whole name, or parts of names (a layer's
            own, ``"q_proj"``, or that of a module that contains it). None: every linear layer and every
            convolution of the blocks, except the head and convolutions that are narrower than `min_width`.
        exclude_modules: which layers are not, in the same forms.
        blocks: name of the stack (its end is enough, and ``*`` stands for a word or a part of it), or one name per
            tower. None: of the stacks that hold adapted layers, the outermost one with the most of them.
        private_layers: whether layers outside the K blocks are adapted too, conventionally.
        roles: see `role_of`.
        min_width: usually the rank, which no layer's basis can exceed.

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
        for name, reason in _left_by_default(module, layers, min_width).items():
            skipped[name] = reason
            log.info("No adapter goes into `%s`: %s.", name, reason)
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
            f" Layers that were there: {found or 'none'}. Name one of these in target_modules."
        )
    wanted = {MAIN: blocks} if isinstance(blocks, str) else blocks
    stacks = find_stacks(module, layers, features, wanted)
    addresses: dict[str, Address | None] = dict.fromkeys(layers)
    own_words: list[str] = []
    for tower, stack in stacks.items():
        found_here, words = _addresses(tower, stack, layers, num_blocks, roles)
        addresses.update(found_here)
        own_words += words
    if not private_layers:
        for name in [name for name, address in addresses.items() if address is None]:
            skipped[name] = "outside the shared blocks, and private_layers is False"
            del addresses[name]
    if not addresses:
        raise ValueError(
            "With num_blocks=0 there are no Co-LoRA layers and with private_layers=False no others, so no layer would "
            "be adapted. Leave one of the two out."
        )
    return Placement(addresses, skipped, {tower: stack.name for tower, stack in stacks.items()}, tuple(own_words))


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
            "All clients that exchange P and Q need the same num_blocks, so choose one that the shallowest model has. "
            "If the blocks stand in another place than was found, name it with `blocks`."
        )
    step = depth // num_blocks
    return [k * step - 1 for k in range(1, num_blocks)] + [depth - 1]


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


def _left_by_default(module: nn.Module, layers: Mapping[str, nn.Module], min_width: int) -> dict[str, str]:
    """Layers that are adapted only if they are named, with the reason."""
    left = dict.fromkeys(_heads(module, layers), "it is the head; name it in target_modules to adapt it")
    convolutions = [name for name, layer in layers.items() if is_convolution(layer) and name not in left]
    stacks = [stack.name for stack in every_stack(module, layers) if len(stack.blocks) > 1]
    for name in convolutions:
        if stacks and not any(name.startswith(inside(stack)) for stack in stacks):
            left[name] = "a convolution outside all blocks (a stem or patches); name it in target_modules to adapt it"
        elif min(features(layers[name])) < min_width:  # networks of convolutions are narrow in parts by design
            left[name] = f"a convolution narrower than the rank, {min_width}"
    return left


def _addresses(
    tower: str, stack: Stack, layers: Mapping[str, nn.Module], num_blocks: int, roles: Mapping[str, str] | None
) -> tuple[dict[str, Address], list[str]]:
    """The addresses of a tower's Co-LoRA layers, and which of these go by words of their own."""
    addresses: dict[str, Address] = {}
    own_words: list[str] = []
    told: set[str] = set()
    for part, index in enumerate(last_blocks(len(stack.blocks), num_blocks) if num_blocks else []):
        block = stack.blocks[index]
        held = {name: path_in(block, name) for name in layers if name == block or name.startswith(inside(block))}
        named = {name: role_of(path, roles) for name, path in held.items()}
        counts = Counter(named.values())
        for name, role in named.items():
            # several layers of one role (experts, two attentions) are told apart by their path in the block
            addresses[name] = Address(tower, part, held[name] if counts[role] > 1 else role)
            if counts[role] > 1 or (held[name] and known_role(held[name], roles) is None):
                own_words.append(name)
            if counts[role] > 1 and role not in told:
                told.add(role)
                log.warning(
                    "Role `%s` occurs %d times in block `%s`; these layers are known by their paths there, such as "
                    "`%s`. Models of other families find no partner for them unless `roles` gives each its own name.",
                    role,
                    counts[role],
                    block,
                    held[name],
                )
    return addresses, own_words


def _heads(module: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Output embeddings of any model inside, and the last linear layer unless it is a part of a repeated block."""
    outputs = [out for child in module.modules() if (out := output_embeddings(child)) is not None]
    heads = [name for name, layer in layers.items() if any(layer is out for out in outputs)]
    last = next(reversed(list(layers)), None)
    if last is not None and last not in heads and len(layers) > 1 and not _in_block(module, layers, last):
        heads.append(last)
    return heads


def _in_block(module: nn.Module, layers: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a layer is a part of an element of a ModuleList, or has its like in another block of a Sequential."""
    for stack in every_stack(module, layers):
        if not name.startswith(inside(stack.name)):
            continue
        own = next(block for block in stack.blocks if name == block or name.startswith(f"{block}."))
        path = path_in(own, name)
        if path and isinstance(module.get_submodule(stack.name), nn.ModuleList):
            return True
        if path and any(f"{block}.{path}" in layers for block in stack.blocks if block != own):
            return True
    return False
