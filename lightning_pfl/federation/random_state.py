"""The state of all random generators as tensors and numbers, so that it loads with ``weights_only=True``."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["capture", "generators_of", "restore"]


def capture(generators: Sequence[torch.Generator] = (), device: torch.device | None = None) -> dict[str, Any]:
    """The state of torch's, numpy's and Python's global generators.

    Args:
        generators: further ones, in a fixed order.
        device: whose CUDA generator to include; others have none that is used here.

    Example:
        >>> before = capture()
        >>> first = torch.rand(2)
        >>> restore(before)
        >>> torch.equal(torch.rand(2), first)
        True
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, numbers, gauss_next = random.getstate()
    assert kind == "MT19937"
    assert version == 3
    return {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": [int(position), int(has_gauss), float(gauss)],
        "python": torch.tensor(numbers, dtype=torch.int64),
        "python_rest": [] if gauss_next is None else [float(gauss_next)],
        "generators": [generator.get_state() for generator in generators],
        **({"cuda": torch.cuda.get_rng_state(device)} if device is not None and device.type == "cuda" else {}),
    }


def restore(
    state: Mapping[str, Any], generators: Sequence[torch.Generator] = (), device: torch.device | None = None
) -> None:
    """Put back what `capture` took, into the global generators and the given ones.

    Raises:
        ValueError: there are more or fewer further generators than there were.
    """
    if len(generators) != len(state["generators"]):
        raise ValueError(
            f"The training dataloaders hold {len(generators)} `torch.Generator` objects, but held "
            f"{len(state['generators'])} in the client's last turn. Build the same dataloaders in every turn."
        )
    torch.set_rng_state(state["torch"])
    position, has_gauss, gauss = state["numpy_rest"]
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate((3, tuple(state["python"].tolist()), *(state["python_rest"] or [None])))
    for generator, saved in zip(generators, state["generators"], strict=True):
        generator.set_state(saved)
    if "cuda" in state and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def generators_of(loaders: Iterable[Any]) -> list[torch.Generator]:
    """The generators that the user gave to dataloaders and their samplers, each once."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        for holder in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                found.setdefault(id(generator), generator)
    return list(found.values())
