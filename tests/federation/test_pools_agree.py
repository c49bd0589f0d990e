"""A whole federated run gives the same bits wherever clients run."""

import pytest
import torch

from lightning_pfl.federation import Client, LocalPool, RayPool
from tests.federation.runs import assert_equal_states, strategy_of
from tests.federation.test_resume import fit, outcome
from tests.federation.test_strategy import FixedSketch, colora
from tests.federation.tiny import Blocks, WideBlocks


@pytest.mark.ray
def test_local_and_ray_and_any_number_of_actors_agree_bit_for_bit(tmp_path, ray_session):
    pools = {"local": LocalPool(), "one": RayPool(num_actors=1), "two": RayPool(num_actors=2)}
    for name, pool in pools.items():
        clients = ["a", Client("b", num_threads=2), "c", Client("wide", model=WideBlocks)]
        strategy = strategy_of(clients, pool=pool, share=(), fraction=0.75)
        torch.manual_seed(len(name))  # the driver's own stream is of no consequence
        fit(tmp_path / name, strategy, 3, module=Blocks(), callbacks=[colora(dropout=0.2), FixedSketch()])

    expected = outcome(tmp_path / "local" / "epoch=2.ckpt")
    assert len(expected["federated"]["store"]["states"]) == 4
    assert_equal_states(outcome(tmp_path / "one" / "epoch=2.ckpt"), expected)
    assert_equal_states(outcome(tmp_path / "two" / "epoch=2.ckpt"), expected)
