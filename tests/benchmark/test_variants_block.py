"""The engine of `benchmarks/variants` computes the last layer by hand: it must be the package's own layer."""

import pytest
import torch

from benchmarks.variants.block import ROLES
from benchmarks.variants.check import largest_difference
from lightning_pfl.adapters import CoLoraConfig, inject
from lightning_pfl.adapters.tensors import bases_of
from lightning_pfl.benchmark._compat import keep_last_layers
from lightning_pfl.benchmark.tiny import tiny_gemma, tiny_llama


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma])
def test_scores_by_hand_are_those_of_the_adapted_layer(make):
    torch.manual_seed(0)
    model, drawn = make(num_layers=2).float(), make(num_layers=2)
    keep_last_layers(model, 1)
    keep_last_layers(drawn, 1)
    inject(drawn, CoLoraConfig(r=4, alpha=8, num_blocks=1, private_layers=False))
    bases = {where.split("/")[-1]: pair for where, pair in bases_of(drawn).items()}
    assert set(bases) == set(ROLES)
    states = torch.randn(3, 9, model.config.hidden_size)

    difference, largest = largest_difference(model, bases, states, torch.tensor([3, 5, 7]))

    assert largest > 0.1
    assert difference < 1e-4 * largest
