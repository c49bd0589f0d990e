"""Features are computed once per picture, edit and encoder, and come back as they were."""

import pytest
import torch
from PIL import Image

from lightning_pfl.benchmark.edits import Turn
from lightning_pfl.benchmark.features import FeatureStore, pool_tokens
from lightning_pfl.benchmark.images import View


class _Mean:
    """Five copies of the mean colour; counts how many pictures it saw."""

    name, size, width = "mean", 8, 3

    def __init__(self):
        self.seen = 0

    def encode(self, pixels):
        self.seen += len(pixels)
        return pixels.mean(dim=(2, 3)).unsqueeze(1).expand(-1, 5, -1)


@pytest.fixture
def views(tmp_path):
    made = []
    for index, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{index}.png")
        made.append(View(tmp_path / f"{index}.png"))
    return made


def test_tokens_come_in_the_order_of_the_views_with_repeats(views, tmp_path):
    store = FeatureStore(_Mean(), folder=tmp_path / "store", batch_size=2)

    tokens = store.tokens([views[2], views[0], views[2]])

    assert tokens.shape == (3, 5, 3)
    assert tokens.dtype == torch.float16
    assert tokens[:, 0].tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]
    assert store.encoder.seen == 2


def test_a_second_store_on_the_same_folder_computes_nothing(views, tmp_path):
    first = FeatureStore(_Mean(), folder=tmp_path / "store").tokens(views)
    again = FeatureStore(_Mean(), folder=tmp_path / "store")

    assert torch.equal(again.tokens(views), first)
    assert again.encoder.seen == 0
    again.tokens([View(views[0].path, (Turn(1),))])
    assert again.encoder.seen == 1


def test_progress_counts_what_had_to_be_computed(views, tmp_path):
    store = FeatureStore(_Mean(), folder=tmp_path / "store", batch_size=2)
    store.tokens(views[:1])
    seen = []

    store.tokens(views, report=lambda done, total: seen.append((done, total)))

    assert seen == [(2, 2)]


def test_a_token_is_the_mean_of_the_whole_or_of_a_quarter():
    feature_map = torch.arange(16.0).view(1, 1, 4, 4)

    # by hand, rows of the map: 0-3, 4-7, 8-11, 12-15
    assert pool_tokens(feature_map).flatten().tolist() == [7.5, 2.5, 4.5, 10.5, 12.5]
