"""What an aggregator remembers of its clients between rounds, in a form that ``torch.load(weights_only=True)`` takes.

Start at `Upload`, the last thing that the server heard of one client. `remember` puts a round's updates over what was
known before; `dump` and `load` turn uploads into plain containers and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_pfl.errors import CheckpointMismatchError
from lightning_pfl.types import ClientUpdate, FlatTensors, Layout, SharedTensors

__all__ = ["Upload", "copied", "dump", "dump_flat", "load", "load_flat", "remember", "require_rule"]


@dataclass(frozen=True, eq=False)
class Upload:
    """The last that the server heard of one client.

    Attributes:
        round: in which round it was trained.
        num_examples: on how many examples.
        architecture: as in `ClientUpdate`.
        shared: the client's trained tensors.
        sketch: its sketches, averaged over rounds; None if it never sent one.
    """

    round: int
    num_examples: int
    architecture: str
    shared: SharedTensors
    sketch: Tensor | None


def remember(known: Mapping[str, Upload], updates: Sequence[ClientUpdate], *, ema: float) -> dict[str, Upload]:
    """Put a round's updates over what was known, sorted by client id.

    Args:
        known: uploads by client id; left alone.
        updates: one per client.
        ema: how much of a client's earlier sketch is kept when a new one comes, 0 to below 1. A client that sends none
            keeps its last.

    Returns:
        Uploads that share no memory with the updates.
    """
    result = dict(known)
    for update in updates:
        before = known[update.client_id].sketch if update.client_id in known else None
        if update.sketch is None:
            sketch = before
        elif before is None or before.shape != update.sketch.shape:
            sketch = update.sketch.detach().clone()
        else:
            sketch = before.lerp(update.sketch.detach(), 1 - ema)
        result[update.client_id] = Upload(
            round=update.round,
            num_examples=update.num_examples,
            architecture=update.architecture,
            shared=SharedTensors(copied(update.shared.common), copied(update.shared.same_architecture)),
            sketch=sketch,
        )
    return {client: result[client] for client in sorted(result)}


def dump(uploads: Mapping[str, Upload]) -> dict[str, Any]:
    """Uploads as plain containers."""
    return {
        client: {
            "round": upload.round,
            "num_examples": upload.num_examples,
            "architecture": upload.architecture,
            "common": dump_flat(upload.shared.common),
            "same_architecture": dump_flat(upload.shared.same_architecture),
            "sketch": upload.sketch,
        }
        for client, upload in uploads.items()
    }


def load(state: Mapping[str, Any]) -> dict[str, Upload]:
    """Undo `dump`."""
    return {
        client: Upload(
            round=entry["round"],
            num_examples=entry["num_examples"],
            architecture=entry["architecture"],
            shared=SharedTensors(load_flat(entry["common"]), load_flat(entry["same_architecture"])),
            sketch=entry["sketch"],
        )
        for client, entry in state.items()
    }


def dump_flat(flat: FlatTensors) -> dict[str, Any]:
    """One flat vector and its layout as plain containers."""
    return {
        "names": list(flat.layout.names),
        "shapes": [list(shape) for shape in flat.layout.shapes],
        "vector": flat.vector,
    }


def load_flat(entry: Mapping[str, Any]) -> FlatTensors:
    """Undo `dump_flat`."""
    return FlatTensors(Layout(tuple(entry["names"]), tuple(tuple(shape) for shape in entry["shapes"])), entry["vector"])


def require_rule(state: Mapping[str, Any], rule: str) -> None:
    """Check that a state was left by the rule that is to go on with it; an empty state fits every rule.

    Raises:
        CheckpointMismatchError: another rule has left it.
    """
    if state and state.get("rule") != rule:
        raise CheckpointMismatchError(
            f"The run was saved with the aggregation rule `{state.get('rule')}` and cannot go on with `{rule}`: "
            "the rules remember different things. Resume with the aggregator that the run was started with."
        )


def copied(flat: FlatTensors) -> FlatTensors:
    """The same numbers in memory of their own."""
    return FlatTensors(flat.layout, flat.vector.detach().clone())
