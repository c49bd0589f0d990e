"""Promises of `lightning_pfl.callbacks.own_order`."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from lightning_pfl.callbacks.own_order import in_own_order


def seen(loader, seed=0):
    torch.manual_seed(seed)
    return [[number for example in examples for number in example.tolist()] for examples in loader]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, range(7)),
        ({"shuffle": True, "drop_last": True}, range(7)),
        ({"sampler": RandomSampler(range(7), replacement=True, num_samples=30)}, range(7)),
        ({"sampler": SubsetRandomSampler([2, 4, 4, 6])}, (2, 4, 6)),
    ],
)
def test_a_pass_has_each_example_once_whatever_the_loader_draws(arguments, expected):
    own = in_own_order(DataLoader(range(7), batch_size=3, **arguments))

    batches = seen(own)

    assert sorted(number for batch in batches for number in batch) == list(expected)
    assert max(map(len, batches)) == 3


def test_the_order_is_the_seeds_and_not_the_loaders():
    """A loader that is not shuffled is; one with a generator of its own does not read it."""
    plain, generated = (
        in_own_order(DataLoader(range(20), batch_size=5, shuffle=generator is not None, generator=generator))
        for generator in (None, torch.Generator().manual_seed(5))
    )

    assert seen(plain) == seen(generated) == seen(plain)
    assert seen(plain) != seen(plain, seed=1)
    assert seen(plain) != [list(range(start, start + 5)) for start in range(0, 20, 5)]


def test_every_example_is_put_alone_into_a_batch_as_the_loader_makes_them():
    """So that no other one's length pads it."""
    own = in_own_order(DataLoader(range(4), batch_size=2, collate_fn=lambda examples: ("batch", *examples)))

    assert sorted(example for examples in own for example in examples) == [("batch", number) for number in range(4)]


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        ([1, 2], "a list is no `DataLoader`"),
        (DataLoader(Endless(), batch_size=2), "a Endless is iterable"),
        (DataLoader(range(3), batch_size=None), "its batches are made by a NoneType"),
        (DataLoader(range(3), sampler=WeightedRandomSampler([1.0, 1.0, 1.0], 9)), "sampler is a WeightedRandomSampler"),
    ],
)
def test_examples_that_cannot_be_counted_are_refused(loader, reason):
    """With the way out."""
    with pytest.raises(ValueError, match=f"{reason}. Give the datamodule a `probe_dataloader"):
        in_own_order(loader)
