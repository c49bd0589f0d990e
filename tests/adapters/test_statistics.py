"""Promises of `lightning_pfl.adapters.statistics`, and of adapters in models that have running statistics."""

from __future__ import annotations

import copy
import pickle

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from lightning_pfl.adapters import CoLoraConfig, inject
from lightning_pfl.adapters.statistics import hold
from tests.adapters.tiny import inputs, output, resnet

CONFIG = CoLoraConfig(r=4, alpha=8, num_blocks=2)


def train(model, steps=3):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model(**inputs(resnet()), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    return model.eval()


def test_training_an_adapter_leaves_the_base_models_statistics_alone():
    model = resnet()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    report = inject(model, CONFIG)

    train(model)

    after = dict(model.named_buffers())
    assert {name for name, _ in model.named_modules() if name.endswith("normalization")} == set(report.held)
    assert "running statistics frozen with the weights: resnet.embedder" in str(report)
    assert all(torch.equal(after[name], buffer) for name, buffer in before.items())


def test_a_trained_adapter_does_the_same_in_a_fresh_base_model(tmp_path):
    """With statistics that moved it would not: they are no part of the adapter."""
    model = train(get_peft_model(resnet(), CONFIG))
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(resnet(), tmp_path)

    assert not torch.allclose(output(model), output(resnet()))
    assert torch.equal(output(loaded), output(model))


def test_statistics_move_where_the_layer_itself_is_trained():
    model = resnet()
    name = "resnet.embedder.embedder.normalization"

    report = inject(model, CONFIG, train_also=[name])
    before = model.get_submodule(name).running_mean.clone()
    train(model)

    assert name not in report.held
    assert not torch.equal(model.get_submodule(name).running_mean, before)
    other = report.held[0]
    assert torch.equal(model.get_submodule(other).running_mean, resnet().get_submodule(other).running_mean)


def test_a_merged_model_has_statistics_of_its_own_again():
    model = get_peft_model(resnet(), CONFIG).merge_and_unload()
    before = model.resnet.embedder.embedder.normalization.running_mean.clone()

    model.train()(**inputs(model))

    assert not torch.equal(model.resnet.embedder.embedder.normalization.running_mean, before)


def test_holding_twice_is_holding_once_and_copies_hold_too():
    layer = nn.BatchNorm2d(3).requires_grad_(False)
    assert hold(layer) == hold(layer) == [""]
    assert len(layer._forward_pre_hooks) == 1

    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        twin.train()(torch.randn(4, 3, 2, 2))
        assert torch.equal(twin.running_mean, torch.zeros(3))
