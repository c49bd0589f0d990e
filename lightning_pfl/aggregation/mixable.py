"""What clients must have in common before their tensors can be mixed, read off the layouts of what they share.

`check_mixable` looks at all clients together; an engine can call it before the first round. What a single update must
satisfy is said in `guard`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from lightning_pfl.types import Layout, SharedTensors

__all__ = ["check_mixable", "some"]


def check_mixable(
    shared: Mapping[str, SharedTensors],
    architectures: Mapping[str, str],
    sketches: Mapping[str, Tensor | None] | None = None,
) -> None:
    """Check that clients' tensors fit each other; only layouts are read, so it can run before any training.

    Roles that only some models have are fine: such a name is mixed over those that hold it. What must agree is the
    shape of a name that two clients hold, the number of blocks of a tower that two clients hold (block 1 of 2 lies
    elsewhere in a model than block 1 of 4), and all names and shapes of what clients of one architecture share.

    Args:
        shared: what each client shares, by client id.
        architectures: `ClientUpdate.architecture` by client id.
        sketches: each client's sketch; they must have one length.

    Raises:
        ValueError: clients that cannot be mixed; it names them and their ranks, numbers of blocks, tensors or lengths.
    """
    common = {client: shared[client].common.layout for client in sorted(shared)}
    _check_blocks(common)
    _check_shapes(common)
    _check_architectures({client: shared[client].same_architecture.layout for client in sorted(shared)}, architectures)
    lengths = {client: sketch.numel() for client, sketch in sorted((sketches or {}).items()) if sketch is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"All clients must send sketches of one length, but they differ: {_by_value(lengths)}. "
            "Give all clients one probe: the same model, `size` and `seed`."
        )


def _check_blocks(layouts: Mapping[str, Layout]) -> None:
    """Co-LoRA's names, ``tower/block/role/P``, must count the same blocks in a tower on every client."""
    blocks: dict[str, dict[str, set[str]]] = {}
    for client, layout in layouts.items():
        for name in layout.names:
            parts = name.split("/")
            if len(parts) == 4 and parts[1].isdigit():
                blocks.setdefault(parts[0], {}).setdefault(client, set()).add(parts[1])
    for tower, by_client in blocks.items():
        counts = {client: len(found) for client, found in by_client.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"Clients must divide tower `{tower}` into one number of blocks, since block i is mixed with block i, "
                f"but they differ: {_by_value(counts)}. Give all clients `CoLoRA(num_blocks={min(counts.values())})`."
            )


def _check_shapes(layouts: Mapping[str, Layout]) -> None:
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for client, layout in layouts.items():
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            shapes.setdefault(name, {})[client] = shape
    for name, by_client in shapes.items():
        if len(set(by_client.values())) == 1:
            continue
        if name.endswith("/P") and all(len(shape) == 2 and shape[0] == shape[1] for shape in by_client.values()):
            ranks = {client: shape[0] for client, shape in by_client.items()}
            raise ValueError(
                f"Clients must have one rank, but `{name}` differs: rank {_by_value(ranks)}. "
                "Give all clients `CoLoRA(rank=...)` with one number."
            )
        raise ValueError(
            f"`{name}` must have one shape on all clients, but it differs: {_by_value(by_client)}. "
            "Share only tensors that do not depend on a model's width, or leave this one out of `share=`."
        )


def _check_architectures(layouts: Mapping[str, Layout], architectures: Mapping[str, str]) -> None:
    first: dict[str, str] = {}
    for client, layout in layouts.items():
        other = first.setdefault(architectures[client], client)
        if layout == layouts[other]:
            continue
        mine = dict(zip(layout.names, layout.shapes, strict=True))
        theirs = dict(zip(layouts[other].names, layouts[other].shapes, strict=True))
        differing = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        name = differing[0] if differing else layout.names[0]
        raise ValueError(
            f"Clients of one architecture must share the same tensors in one order, but {some(differing)} differ "
            f"between `{other}` ({theirs.get(name, 'absent')}) and `{client}` ({mine.get(name, 'absent')}). "
            "Give both the same adapter settings, or models of different architectures."
        )


def _by_value(values: Mapping[str, object]) -> str:
    """``16 on a, b; 8 on c``."""
    clients: dict[object, list[str]] = {}
    for client, value in values.items():
        clients.setdefault(value, []).append(client)
    return "; ".join(f"{value} on {some(found)}" for value, found in clients.items())


def some(names: Iterable[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    listed = [f"`{name}`" for name in names]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
