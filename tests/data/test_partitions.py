"""Every row belongs to exactly one client, and the same seed gives the same parts."""

import pytest
import torch

from lightning_pfl.data import dirichlet_partition, even_partition, partition_by_key


def rows_of(parts):
    return sorted(row for part in parts for row in part.tolist())


def test_every_row_belongs_to_exactly_one_client():
    labels = torch.arange(200) % 5
    for parts in (
        even_partition(200, 7, seed=3),
        dirichlet_partition(labels, 7, concentration=0.3, seed=3),
        partition_by_key(labels.tolist(), 3),
    ):
        assert rows_of(parts) == list(range(200))


def test_the_seed_decides_the_parts():
    labels = torch.arange(200) % 5

    def draw(seed):
        return [part.tolist() for part in dirichlet_partition(labels, 4, concentration=1.0, seed=seed)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_small_concentration_skews_the_labels():
    """Share of a client's most frequent class: 1/5 when even, near 1 when strongly skewed."""
    labels = torch.arange(5000) % 5

    def mean_top_share(concentration):
        parts = dirichlet_partition(labels, 10, concentration=concentration, seed=0)
        return sum((labels[part].bincount().max() / len(part)).item() for part in parts) / 10

    assert mean_top_share(1000.0) < 0.25
    assert mean_top_share(0.05) > 0.6


def test_every_client_gets_the_rows_it_needs():
    parts = dirichlet_partition(torch.arange(100) % 2, 5, concentration=0.2, min_rows=8, seed=0)
    assert min(map(len, parts)) >= 8


def test_too_many_clients_are_refused():
    with pytest.raises(ValueError, match="Cannot divide 3 rows"):
        even_partition(3, 4)
    with pytest.raises(ValueError, match="`concentration` must be positive"):
        dirichlet_partition([0, 1], 2, concentration=0.0)
    with pytest.raises(ValueError, match="No draw in 1,000"):
        dirichlet_partition([0] * 10, 5, concentration=0.001, min_rows=2)


def test_rows_of_one_key_stay_together():
    parts = partition_by_key(["a", "b", "c", "a", "b"], 2)
    # a and c go to the first client, b to the second
    assert [part.tolist() for part in parts] == [[0, 2, 3], [1, 4]]
