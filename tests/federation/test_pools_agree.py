"""A whole federated run gives the same bits wherever clients run."""

import pytest
import torch

from lightning_pfl.federation import Client, LocalPool, RayPool, StackedPool
from lightning_pfl.federation.turn import unpack_state
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


class Gentle(Blocks):
    """Steps that rounding does not turn around."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def close_states(got, expected):
    """As `assert_equal_states`, but numbers may differ by rounding, and what is compressed or counted is left out."""
    for name, state in expected["store"]["states"].items():
        one, other = (unpack_state(of.numpy().tobytes()) for of in (got["store"]["states"][name], state))
        torch.testing.assert_close(one["state_dict"], other["state_dict"], rtol=1e-4, atol=1e-6)
        assert one["loops"]["fit_loop"]["epoch_progress"] == other["loops"]["fit_loop"]["epoch_progress"]


@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["stacked", "one by one"])
def test_local_and_stacked_agree_within_rounding_and_bit_for_bit_where_nothing_can_be_stacked(tmp_path, dropout):
    saved = {}
    for name, pool in {"local": LocalPool(), "stacked": StackedPool(at_once=3)}.items():
        clients = ["a", Client("b", num_threads=2), "c", "d", Client("wide", model=WideBlocks)]
        strategy = strategy_of(clients, pool=pool, share=(), fraction=0.8)
        torch.manual_seed(len(name))
        fit(tmp_path / name, strategy, 3, module=Gentle(), callbacks=[colora(dropout=dropout), FixedSketch()])
        saved[name] = outcome(tmp_path / name / "epoch=2.ckpt")

    if dropout:
        assert_equal_states(saved["stacked"], saved["local"])
    else:
        close_states(saved["stacked"]["federated"], saved["local"]["federated"])
