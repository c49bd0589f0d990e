"""Adapted models under `torch.compile`: what they compute, and that gates still know their prompt."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_pfl.adapters import CoLoraConfig, CoLoraConv, CoLoraLinear, InputGate, StaticGate, inject
from tests.adapters.tiny import gpt2, inputs, llama, resnet, scores, scramble


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(model, gate):
    inject(model, CoLoraConfig(r=4, alpha=8, num_blocks=2, gate=gate, global_branch=True))
    scramble(model)
    return model.train()


def trained_by(forward, model, batch):
    """Output and gradients of one step."""
    model.zero_grad()
    found = scores(forward(**batch))
    found.square().mean().backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("build", "gate"), [(llama, InputGate()), (resnet, StaticGate())], ids=["llama", "resnet"])
def test_compiled_it_computes_and_learns_the_same(build, gate):
    model = adapted(build(depth=2), gate)
    batch = inputs(model)
    if build is llama:
        batch |= {"labels": batch["input_ids"].masked_fill(torch.arange(6) < 3, -100), "use_cache": False}
    expected, gradients = trained_by(model, model, batch)

    found, compiled = trained_by(torch.compile(model, backend="aot_eager"), model, batch)

    torch.testing.assert_close(found, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[name], gradient, atol=1e-6, rtol=1e-4)


def test_compiled_prompts_of_several_lengths_have_openings_of_their_own():
    """One compiled model, several prompts: what one pass read does not stay in the next, nor in the model itself."""
    model = adapted(gpt2(depth=2), InputGate()).eval()
    compiled = torch.compile(model, backend="aot_eager")
    ids = inputs(model)["input_ids"]
    with torch.no_grad():
        for start in (2, 4, 2):
            labels = ids.masked_fill(torch.arange(6) < start, -100)
            batch = {"input_ids": ids, "labels": labels, "use_cache": False}
            torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)


def test_the_default_backend_compiles_layers_of_both_kinds_without_a_break():
    """Inductor itself; `fullgraph` refuses to leave a part uncompiled."""
    config = CoLoraConfig(
        r=2, placement={"conv": "main/0/conv1", "linear": "main/0/fc1"}, base_identity="test", global_branch=True
    )
    conv = CoLoraConv(nn.Conv2d(4, 6, 3, padding=1), "default", "conv", config)
    linear = CoLoraLinear(nn.Linear(5, 4), "default", "linear", config)
    net = nn.Sequential(conv, nn.ReLU(), linear)
    scramble(net)
    x = torch.randn(2, 4, 5, 5)

    with torch.no_grad():
        found = torch.compile(net, fullgraph=True)(x)

    torch.testing.assert_close(found, net(x))
