"""Promises of `lightning_pfl.adapters.injection`."""

from __future__ import annotations

import copy
import logging
import pickle

import lightning as L
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lightning_pfl.adapters import CoLoraConfig, InputGate, StaticGate, add_global_branch, config_of, inject
from tests.adapters.tiny import inputs, llama, mlp, output, scramble, vit

CONFIG = CoLoraConfig(r=4, alpha=8, num_blocks=2)


class Lit(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = llama()
        self.score = nn.Linear(32, 3)

    def forward(self, **batch):
        return self.score(self.net(**batch).logits)


def trained(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


def test_a_whole_lightning_module_is_adapted_in_place_and_its_head_can_stay_trainable():
    module = Lit()
    before = module(**inputs(module.net))

    report = inject(module, CONFIG, train_also=["score"])

    assert torch.equal(module(**inputs(module.net)), before)
    assert report.train_also == ("score.weight", "score.bias")
    assert {name.split(".")[-2] for name in trained(module) - set(report.train_also)} == {
        "colora_P", "colora_Q", "colora_A", "colora_B",
    }  # fmt: skip
    assert len(report.colora) == 14
    assert len(report.conventional) == 14
    assert set(report.skipped) == {"net.lm_head", "score"}
    # by hand: 14 Co-LoRA layers of 4*4+4; per block r (in + out): 4 * (4*32 + 3*40), twice; 32*3+3
    assert report.num_trainable == 14 * 20 + 2 * 4 * (4 * 32 + 3 * 40) + 99


@pytest.mark.parametrize("pattern", ["score", "score.bias", "sc*", "*.bias"])
def test_what_to_train_as_well_is_named_by_parameter_module_or_pattern(pattern):
    module = Lit()
    assert "score.bias" in inject(module, CONFIG, train_also=[pattern]).train_also


def test_a_name_to_train_as_well_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"`train_also` names `head`.* The Lit consists of: net, score"):
        inject(Lit(), CONFIG, train_also=["head"])


def test_injecting_again_changes_nothing():
    module = Lit()
    first = inject(module, CONFIG, train_also=["score"])
    scramble(module)
    before, names = copy.deepcopy(module.state_dict()), trained(module)

    assert inject(module, CoLoraConfig(r=4, alpha=8, num_blocks=2), train_also=["score"]) == first
    assert trained(module) == names
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_injecting_again_after_a_global_branch_came_keeps_it():
    module = mlp()
    inject(module, CONFIG)
    add_global_branch(module)

    inject(module, CONFIG)

    assert config_of(module).global_branch


def test_injecting_again_with_a_global_branch_adds_it():
    module = mlp()
    inject(module, CONFIG)

    inject(module, CoLoraConfig(r=4, alpha=8, num_blocks=2, global_branch=True))

    assert {name for name in trained(module) if "gate" in name} == {f"{i}.colora_gate.default" for i in (0, 2, 4, 6)}


def test_another_config_is_refused_with_the_difference():
    module = mlp()
    inject(module, CONFIG)
    with pytest.raises(ValueError, match=r"another config already \(r: 4 there, 2 asked for\)"):
        inject(module, CoLoraConfig(r=2, alpha=8, num_blocks=2))


def test_nothing_is_replaced_when_the_model_cannot_hold_what_is_asked():
    for config in (CoLoraConfig(r=9, num_blocks=2), CoLoraConfig(r=2, target_modules=["nope"]), CoLoraConfig(r=2)):
        module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 2))
        with pytest.raises(ValueError, match=r"rank|No layer|num_blocks"):
            inject(module, config)
        assert [type(child) for child in module] == [nn.Linear] * 4
        assert len(trained(module)) == 8


def test_the_config_that_is_passed_stays_the_users_own():
    config = CoLoraConfig(r=4, alpha=8, num_blocks=2)
    inject(mlp(), config)
    inject(llama(), config)

    assert config == CoLoraConfig(r=4, alpha=8, num_blocks=2)


def test_the_log_says_where_adapters_went_and_that_the_head_has_none(caplog):
    with caplog.at_level(logging.INFO, "lightning_pfl.adapters"):
        inject(llama(), CONFIG)

    assert "No adapter goes into `lm_head`: it is the head" in caplog.text
    assert "14 Co-LoRA layers in 2 blocks, roles down, gate, k, o, q, up, v; 14 conventional layers" in caplog.text


@pytest.mark.parametrize("gate", [StaticGate(), InputGate()])
def test_copies_and_pickles_work_by_themselves(gate):
    module = llama()
    inject(module, CoLoraConfig(r=4, alpha=8, num_blocks=2, gate=gate, global_branch=True))
    scramble(module)
    expected = output(module)

    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(output(twin), expected)
        scramble(twin, seed=6)
        assert not torch.allclose(output(twin), expected)
        config_of(twin).global_branch = False
        assert config_of(module).global_branch
    assert torch.equal(output(module), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("gate", [StaticGate(), InputGate()])
def test_gradient_checkpointing_gives_the_same_gradients(gate, use_reentrant):
    def gradients(checkpoint):
        module = llama()
        inject(module, CoLoraConfig(r=4, alpha=8, num_blocks=2, gate=gate, global_branch=True))
        scramble(module)
        module.train()
        if checkpoint:
            module.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            module.enable_input_require_grads()
        batch = inputs(module)
        labels = batch["input_ids"].clone()
        labels[:, :3] = -100
        module(**batch, labels=labels, use_cache=False).loss.backward()
        return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)

    assert all(grad is not None and grad.abs().max() > 0 for grad in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(recomputed[name], grad)


def test_a_bfloat16_model_trains_float32_adapters():
    module = vit().to(torch.bfloat16)
    inject(module, CONFIG)

    output(module)
    loss = module(**inputs(module)).logits.float().square().mean()
    loss.backward()

    kinds = {(p.dtype, p.grad.dtype) for p in module.parameters() if p.requires_grad}
    assert kinds == {(torch.float32, torch.float32)}


def test_layers_of_another_peft_method_are_left_alone():
    module = llama()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), module)

    report = inject(module, CONFIG)

    assert "another PEFT method" in report.skipped["model.layers.0.self_attn.q_proj"]
    assert len(report.colora) == 12


def test_a_module_without_adapters_says_so():
    with pytest.raises(ValueError, match=r"The Sequential holds no Co-LoRA adapters"):
        add_global_branch(mlp())
