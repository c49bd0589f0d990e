"""`in_own_order`: a loader's examples one by one, each once per pass, in an order that nothing but a seed decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

__all__ = ["in_own_order"]


def in_own_order(loader: Any) -> DataLoader[Any]:
    """A loader over the same examples, shuffled anew by torch's global generator whenever it is iterated.

    In which order a training meets its examples can depend on what they hold: a shuffle reads the generator that
    dropout has used before, more of it for longer texts. A bound on one example's influence must not rely on that.

    Args:
        loader: a `DataLoader` of batches, over a data set with an index.

    Returns:
        A loader in this process that yields lists of as many examples as the loader's batches have (the last may have
        fewer), each put by the same ``collate_fn`` into a batch of its own.

    Raises:
        ValueError: which examples the loader yields cannot be known: it is none, its data set is iterable, or its
            sampler is none of torch's that yield each example once (a random one that draws again is read as one that
            does not).

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> loader = DataLoader(range(5), batch_size=2, sampler=SubsetRandomSampler([1, 3, 4]))
        >>> sorted(example.tolist() for examples in in_own_order(loader) for example in examples)
        [[1], [3], [4]]
    """
    if not isinstance(loader, DataLoader):
        raise _unknown(f"a {type(loader).__name__} is no `DataLoader`")
    if isinstance(loader.dataset, IterableDataset):
        raise _unknown(f"a {type(loader.dataset).__name__} is iterable")
    if type(loader.batch_sampler) is not BatchSampler:
        raise _unknown(f"its batches are made by a {type(loader.batch_sampler).__name__}")
    sampler = loader.batch_sampler.sampler
    indices: Sequence[int]
    if isinstance(sampler, SequentialSampler | RandomSampler):
        indices = range(len(sampler.data_source))
    elif isinstance(sampler, SubsetRandomSampler):
        indices = sorted(set(sampler.indices))
    else:
        raise _unknown(f"its sampler is a {type(sampler).__name__}")
    collate = loader.collate_fn
    return DataLoader(
        Subset(loader.dataset, indices),
        batch_size=loader.batch_size,
        shuffle=True,
        collate_fn=lambda examples: [collate([example]) for example in examples],
    )


def _unknown(reason: str) -> ValueError:
    return ValueError(
        f"Where noise hides single examples, it must be known which examples a loader yields how often, but {reason}. "
        "Give the datamodule a `probe_dataloader()` that returns a `DataLoader` over a data set with an index, or hide "
        "whole clients by `ClientNoise`."
    )
