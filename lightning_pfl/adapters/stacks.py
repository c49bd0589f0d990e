"""Stacks of blocks in a module tree, by which models of other depths are compared.

Start at `find_stacks`. A stack is the children of a ModuleList or Sequential; where these are stages (their widths
differ, and each is a stack itself, as in convolutional networks), the blocks are those inside the stages, in order. A
stack is named by its module, one in stages by a pattern such as ``encoder.stages.*.layers`` or ``layer*``.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

__all__ = ["MAIN", "Stack", "blocks_of", "every_stack", "find_stacks", "inside", "output_embeddings", "path_in"]

log = logging.getLogger(__name__)

MAIN = "main"
"""Name of the tower when the user does not name towers."""

Width = Callable[[nn.Module], tuple[int, int]]


@dataclass(frozen=True)
class Stack:
    """A stack and those of its blocks that hold adapted layers.

    Attributes:
        name: of the module that holds the blocks, or a pattern that all such modules fit; empty for the whole model.
        blocks: names of the blocks, in order.
        num_layers: how many adapted layers the blocks hold together.
    """

    name: str
    blocks: tuple[str, ...]
    num_layers: int


def find_stacks(
    module: nn.Module, layers: Mapping[str, nn.Module], width: Width, wanted: Mapping[str, str] | None
) -> dict[str, Stack]:
    """The stack of each tower.

    Args:
        module: any.
        layers: adapted layers by name, in module order.
        width: of a layer; where it differs along a stack of stacks, that is one of stages.
        wanted: name or pattern per tower (the end is enough). None: one tower, `MAIN`, the outermost of the stacks with
            the most adapted layers; where a language model writes, one of its own and not of a tower that it sees with.

    Returns:
        By tower.

    Raises:
        ValueError: a name that fits no stack or several, or several stacks with equally many layers.
    """
    if wanted is not None:
        return {tower: _named(module, layers, path, width) for tower, path in wanted.items()}
    every = list(every_stack(module, layers))
    every += _numbered(every, layers, width)
    beside = tuple(inside(name) for name in _senses(module))
    every = [stack for stack in every if not stack.name.startswith(beside)] or every
    candidates = [stack for stack in every if len(stack.blocks) > 1] or [stack for stack in every if stack.blocks]
    if not candidates:
        log.info("The model has no stack of blocks (no ModuleList or Sequential): the whole of it counts as one block.")
        return {MAIN: Stack("", ("",), len(layers))}
    most = max(stack.num_layers for stack in candidates)
    best: list[Stack] = []
    for stack in candidates:  # parents come before their children, so the first of a nest is the outermost
        if stack.num_layers == most and not any(stack.name.startswith(inside(outer.name)) for outer in best):
            best.append(stack)
    if len(best) > 1:
        names = [stack.name for stack in best]
        raise ValueError(
            f"The model has several stacks of blocks with {most} adapted layers each: {names}. Say which one clients "
            f"share with blocks={names[0]!r}, or share several with blocks={{'tower_a': {names[0]!r}, "
            f"'tower_b': {names[1]!r}}} (the same tower names on all clients), or leave one out with exclude_modules."
        )
    return {MAIN: _within_stages(module, best[0], layers, width)}


def every_stack(module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[Stack]:
    """Every ModuleList, and every Sequential whose adapted children are of one kind (others are pipelines)."""
    for name, child in module.named_modules():
        if not isinstance(child, (nn.ModuleList, nn.Sequential)):
            continue
        stack = _stack(name, child, layers)
        kinds = {type(module.get_submodule(block)) for block in stack.blocks}
        if isinstance(child, nn.ModuleList) or len(kinds) == 1:
            yield stack


def blocks_of(module: nn.Module, name: str) -> list[str]:
    """Names of all blocks of a stack, whether they hold adapted layers or not.

    Example:
        >>> tree = nn.ModuleDict({f"layer{i}": nn.Sequential(nn.Linear(1, 1), nn.ReLU()) for i in (1, 2)})
        >>> blocks_of(tree, "layer*")
        ['layer1.0', 'layer1.1', 'layer2.0', 'layer2.1']
    """
    found = [inner for inner, _ in module.named_modules() if _fits(inner, name)]
    return [inside(inner) + key for inner in found for key, _ in module.get_submodule(inner).named_children()]


def inside(name: str) -> str:
    """With what the names of a module's parts begin."""
    return f"{name}." if name else ""


def path_in(block: str, name: str) -> str:
    """A layer's path inside a block; empty when the layer is the block."""
    return name[len(inside(block)) :]


def _stack(name: str, child: nn.Module, layers: Mapping[str, nn.Module]) -> Stack:
    counts = Counter(path_in(name, layer).split(".", 1)[0] for layer in layers if layer.startswith(inside(name)))
    blocks = tuple(inside(name) + key for key, _ in child.named_children() if counts[key])
    return Stack(name, blocks, sum(counts.values()))


def _joined(name: str, stacks: Sequence[Stack]) -> Stack:
    blocks = tuple(block for stack in stacks for block in stack.blocks)
    return Stack(name, blocks, sum(stack.num_layers for stack in stacks))


def _named(module: nn.Module, layers: Mapping[str, nn.Module], path: str, width: Width) -> Stack:
    """The stack that a user names."""
    starred = path.count(".") + 1
    by_place: dict[tuple[str, ...], list[Stack]] = defaultdict(list)
    for name, child in module.named_modules():
        if _fits(name, path, end=True) and (stack := _stack(name, child, layers)).blocks:
            words = name.split(".")
            before, pattern = words[:-starred], path.split(".")
            own = [word if "*" not in part else part for word, part in zip(words[-starred:], pattern, strict=True)]
            by_place[(*before, *own)].append(stack)
    if len(by_place) != 1:
        there = [stack.name for stack in every_stack(module, layers) if stack.blocks]
        raise ValueError(
            f"`blocks` must name one stack that holds adapted layers, but `{path}` fits "
            f"{['.'.join(words) for words in by_place] or 'none'}. Stacks that were there: {there or 'none'}."
        )
    (words, stacks), *_ = by_place.items()
    joined = _joined(".".join(words), stacks)
    return joined if "*" in path else _within_stages(module, joined, layers, width)


def _fits(name: str, pattern: str, *, end: bool = False) -> bool:
    """Whether a dotted name, or only its end, fits a pattern word by word."""
    words, parts = name.split("."), pattern.split(".")
    if end:
        words = words[-len(parts) :]
    return len(words) == len(parts) and all(map(fnmatchcase, words, parts))


def _numbered(stacks: Sequence[Stack], layers: Mapping[str, nn.Module], width: Width) -> list[Stack]:
    """Stages that stand beside one another under one name with a number: ``layer1``, ``layer2``."""
    groups: dict[str, list[Stack]] = defaultdict(list)
    for stack in stacks:
        parent, _, own = stack.name.rpartition(".")
        if re.search(r"[^\W\d]", own) and re.search(r"\d", own) and stack.blocks:
            groups[inside(parent) + re.sub(r"\d+", "*", own)].append(stack)
    return [
        _joined(name, members)
        for name, members in groups.items()
        if len(members) > 1 and _widths_differ([member.name for member in members], layers, width)
    ]


def _senses(module: nn.Module) -> list[str]:
    """Transformers models that read pictures or sound for a language model that stands in the same module."""
    models = {name: child for name, child in module.named_modules() if hasattr(child, "main_input_name")}
    writers = [
        name
        for name, child in models.items()
        if output_embeddings(child) is not None and not getattr(child.config, "is_encoder_decoder", False)
    ]
    return [
        name
        for name, child in models.items()
        if writers
        and child.main_input_name != "input_ids"
        and not any(writer == name or writer.startswith(inside(name)) for writer in writers)
    ]


def output_embeddings(child: Any) -> nn.Module | None:
    """The layer that a transformers model writes its words with; None for a module that has none."""
    if not callable(getattr(child, "get_output_embeddings", None)):
        return None
    try:
        found = child.get_output_embeddings()
    except (NotImplementedError, AttributeError):  # transformers raises either for a model without them
        return None
    layer = getattr(found, "base_layer", found)
    return layer if isinstance(layer, nn.Module) else None


def _within_stages(module: nn.Module, stack: Stack, layers: Mapping[str, nn.Module], width: Width) -> Stack:
    """A stack itself, or what its blocks consist of if they are stages.

    Stages differ in width, where the blocks of a transformer are alike (and experts inside them are no stages); each is
    in the main a stack of blocks of one kind, which hold more than one adapted layer.
    """
    if len(stack.blocks) < 2 or not _widths_differ(stack.blocks, layers, width):
        return stack
    inner: dict[str, list[Stack]] = defaultdict(list)
    for stage in stack.blocks:
        held = sum(name.startswith(inside(stage)) for name in layers)
        for candidate in every_stack(module.get_submodule(stage), _below(stage, layers)):
            kinds = {type(module.get_submodule(inside(stage) + block)) for block in candidate.blocks}
            is_deep = candidate.num_layers > len(candidate.blocks)
            if len(kinds) == 1 and is_deep and candidate.num_layers >= held - 1:  # one layer may join the stages
                inner[candidate.name].append(
                    Stack("", tuple(inside(stage) + block for block in candidate.blocks), candidate.num_layers)
                )
    for path, stacks in inner.items():
        if len(stacks) == len(stack.blocks):
            return _joined(f"{stack.name}.*" + (f".{path}" if path else ""), stacks)
    return stack


def _below(prefix: str, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {path_in(prefix, name): layer for name, layer in layers.items() if name.startswith(inside(prefix))}


def _widths_differ(parts: Sequence[str], layers: Mapping[str, nn.Module], width: Width) -> bool:
    """Whether layers at one path have other widths in other parts."""
    seen: dict[str, tuple[int, int]] = {}
    for part in parts:
        for path, layer in _below(part, layers).items():
            if seen.setdefault(path, width(layer)) != width(layer):
                return True
    return False
