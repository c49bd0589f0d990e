"""Every method in a run of two families of models, stopped and resumed."""

from functools import partial

import pytest
import torch
from torch import nn

from lightning_pfl import methods
from lightning_pfl.callbacks.colora import CoLoRA
from lightning_pfl.callbacks.routing_keys import RoutingKeys
from lightning_pfl.federation import Client
from lightning_pfl.federation.turn import unpack_state
from tests.federation.runs import assert_equal_states, strategy_of
from tests.federation.test_experts import Inputs
from tests.federation.test_resume import fit, outcome
from tests.federation.test_strategy import FixedSketch
from tests.federation.tiny import Blocks, WideBlocks
from tests.methods.numbers import public_logits

SMALL = partial(CoLoRA, rank=2, alpha=4, num_blocks=1, target_modules=["fc"], train_also=["head"], dropout=0.2)


def squares(module, batch):
    h = module(batch[0])
    return nn.functional.mse_loss(h, batch[1]), torch.cat([torch.zeros_like(h), h], dim=1)


def graded(module, batch):
    h = module(batch)
    return (h - 1).square()[:, 0], torch.cat([torch.zeros_like(h), h], dim=1)


def corners(module):
    return [torch.eye(4)]


RANKS = {"a": 1, "b": 2, "wide": 2}
FAMILY_TASKS = {"a": ["x"], "b": ["x"], "wide": ["x", "y"]}
METHODS = {
    "local_only": methods.local_only,
    "no_exchange": methods.no_exchange,
    "zero_global": methods.zero_global,
    "fedavg": methods.fedavg,
    "warm_started": methods.warm_started,
    "fedprox": methods.fedprox,
    "fedper": partial(methods.fedper, keep=["main/0/fc/Q", "blocks.0.*"]),
    "ditto": methods.ditto,
    "fedsim": methods.fedsim,
    "feddpa": methods.feddpa,
    "feddat": partial(methods.feddat, outputs=squares),
    "perada": partial(methods.perada, batches=corners, logits=public_logits),
    "takfl": partial(methods.takfl, batches=corners, logits=public_logits),
    "fedmkt": partial(methods.fedmkt, batches=corners, outputs=graded),
    "flexlora": partial(methods.flexlora, ranks=RANKS),
    "hetlora": partial(methods.hetlora, ranks=RANKS, decay=0.5, penalty=3.0),
    "flora": partial(methods.flora, ranks=RANKS),
    "ours": methods.ours,
    "routed": methods.routed,
    "routed_local": methods.routed_local,
    "routed_with": partial(methods.routed_with, of=methods.pulled_to_all),
    "random_bases": methods.random_bases,
    "frozen_mixture": methods.frozen_mixture,
    "pulled_to_all": methods.pulled_to_all,
    "paper": methods.paper,
    "uniform": partial(methods.uniform, warm_start=True),
    "shuffled": methods.shuffled,
    "oracle": partial(methods.oracle, tasks=FAMILY_TASKS),
    "unaligned": methods.unaligned,
    "no_colora": methods.no_colora,
}


def test_every_method_is_run_below():
    public = {name for name in methods.__all__ if name[0].islower()}

    assert public == set(METHODS)


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())
def test_two_families_train_and_resuming_equals_not_stopping(tmp_path, make):
    def play(folder, rounds, **arguments):
        method = make(SMALL)
        clients = ["a", "b", Client("wide", model=WideBlocks)]
        strategy = strategy_of(clients, share=(), aggregator=method.aggregator, local_steps=2)
        callbacks = [*method.callbacks, FixedSketch(), *([] if method.answering is None else [RoutingKeys(Inputs())])]
        module = Blocks()
        fit(folder, strategy, rounds, module=module, callbacks=callbacks, horizon=2, **arguments)
        return strategy, module

    strategy, module = play(tmp_path / "whole", 2)
    play(tmp_path / "parts", 1)
    resumed, _ = play(tmp_path / "parts", 2, ckpt_path=tmp_path / "parts" / "epoch=0.ckpt")

    got, expected = (outcome(tmp_path / folder / "epoch=1.ckpt") for folder in ("parts", "whole"))
    assert_equal_states(got, expected)
    assert resumed.traffic == strategy.traffic
    x = torch.ones(1, 4)
    assert not torch.equal(strategy.personalize(module, "a")(x), Blocks()(x))
    state = unpack_state(strategy.store.get("a"))["state_dict"]
    for name, value in state.items():
        if "colora_B" in name or "colora_P" in name:
            assert value.any(), f"{name} was not trained"
