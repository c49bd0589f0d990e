"""Promises of `lightning_pfl.adapters.config`."""

from __future__ import annotations

import pytest
from peft import PeftConfig
from torch import nn

from lightning_pfl.adapters import Additive, CoLoraConfig, InputGate
from tests.adapters.tiny import llama, mlp


def test_a_saved_config_is_read_back_as_it_was(tmp_path):
    config = CoLoraConfig(
        r=4,
        alpha=6,
        num_blocks=2,
        target_modules={"q_proj", "k_proj"},
        exclude_modules="vision.*",
        blocks={"text": "model.layers"},
        private_layers=False,
        roles={"mixer": "q"},
        dropout=0.1,
        seed=3,
        gate=InputGate(combine=Additive()),
        global_branch=True,
        placement={"a": "main/0/q", "b": None},
        base_identity="mine",
    )
    config.save_pretrained(tmp_path)

    for read in (CoLoraConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert type(read) is CoLoraConfig
        assert read == config


def test_resolving_changes_a_copy():
    config = CoLoraConfig(r=2, num_blocks=2)

    resolved, _ = config.resolved(mlp())

    assert config.placement is None
    assert resolved.placement == {"0": None, "2": "main/0/linear", "4": None, "6": "main/1/linear"}


def test_bases_depend_on_the_base_model_and_not_on_where_it_stands_or_what_is_adapted():
    def identity(module, **more):
        return CoLoraConfig(r=2, num_blocks=2, **more).resolved(module)[0].base_identity

    alone = identity(llama())

    assert identity(nn.ModuleDict({"net": llama(), "head": nn.Linear(16, 2)})) == alone
    assert identity(llama(), target_modules=["q_proj"], seed=4) == alone
    assert identity(llama(depth=3)) != alone
    assert identity(llama(), base_identity="mine") == "mine"


def test_a_placement_without_layers_is_refused():
    with pytest.raises(ValueError, match="but is empty"):
        CoLoraConfig(r=2, num_blocks=2, placement={}).resolved(mlp())


def test_a_placement_for_another_model_is_refused():
    resolved, _ = CoLoraConfig(r=2, num_blocks=2).resolved(llama())

    with pytest.raises(ValueError, match=r"made for a model with the layers .*model.layers.0"):
        resolved.resolved(mlp())


def test_a_rank_that_a_colora_layer_cannot_hold_is_refused_by_name():
    with pytest.raises(ValueError, match=r"at least as wide as the rank, 9, but `2` maps 8 to 8 features \(and 1 more"):
        CoLoraConfig(r=9, num_blocks=2).resolved(mlp())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"r": 0}, "rank `r` must be a positive integer, but is 0"),
        ({"alpha": 0}, "`alpha` must be positive"),
        ({"num_blocks": -1}, "`num_blocks` must be an integer and not negative, but is -1"),
        ({"dropout": 1.0}, "`dropout` must lie in"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        CoLoraConfig(**wrong)


def test_alpha_follows_the_rank_unless_it_is_given():
    assert CoLoraConfig(r=8).scale == CoLoraConfig().scale == 2
    assert CoLoraConfig(r=8, alpha=4).scale == 0.5


def test_differences_are_what_is_asked_for_and_not_there():
    there, _ = CoLoraConfig(r=2, num_blocks=2, base_model_name_or_path="a").resolved(mlp())

    assert there.differences(CoLoraConfig(r=2, num_blocks=2, global_branch=True)) == {}
    assert there.differences(CoLoraConfig(r=4, alpha=4, num_blocks=2)) == {"r": (2, 4)}
    other = CoLoraConfig(r=2, num_blocks=2, base_identity="mine", placement={"0": None})
    assert set(there.differences(other)) == {"base_identity", "placement"}
