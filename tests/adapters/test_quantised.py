"""Adapters around base layers whose weights are codes: called as they are, never read, never merged into."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import get_peft_model
from torch import nn

from lightning_pfl.adapters import CoLoraConfig, InputGate, StaticGate, inject
from lightning_pfl.adapters.injection import adapted_layers
from tests.adapters.tiny import inputs, llama, output, scramble

CONFIG = CoLoraConfig(r=4, alpha=8, num_blocks=2)


class Int8Linear(nn.Linear):
    """Weights as eight-bit codes with a scale per output, packed: nothing but its own forward makes sense of them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        codes = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes.reshape(-1, 1), requires_grad=False)
        if layer.bias is not None:
            self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.reshape(self.out_features, self.in_features) * self.scale
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


def bitsandbytes(kind: str):
    def quantise(layer: nn.Linear) -> nn.Module:
        bnb = pytest.importorskip("bitsandbytes")
        shape = (layer.in_features, layer.out_features, layer.bias is not None)
        made = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        if kind == "4bit":
            made = bnb.nn.Linear4bit(*shape, compute_dtype=torch.float32)
        made.load_state_dict(layer.state_dict())
        return made.to("cpu")  # quantises

    return quantise


KINDS = {"codes": Int8Linear, "bitsandbytes 8 bit": bitsandbytes("8bit"), "bitsandbytes 4 bit": bitsandbytes("4bit")}
has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
every_kind = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.skipif("bits" in kind and not has_bitsandbytes, reason="not installed"))
        for kind in KINDS
    ],
)


def quantised(kind: str) -> nn.Module:
    """A Llama whose layers all are quantised, but for the head."""
    model = llama(hidden_size=64, intermediate_size=64)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, KINDS[kind](layer))
    return model.requires_grad_(False)


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base_layer", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if not p.is_floating_point()
    }


@every_kind
@pytest.mark.parametrize("settings", [{}, {"gate": StaticGate()}, {"gate": InputGate()}], ids=str)
def test_adapters_train_around_codes_and_leave_them_alone(kind, settings):
    model = quantised(kind)
    expected, before = output(model), codes(model)
    assert len(before) == 28

    report = inject(model, CoLoraConfig(r=4, alpha=8, num_blocks=2, global_branch=bool(settings), **settings))

    assert len(report.colora) == len(report.conventional) == 14
    assert torch.equal(output(model), expected)
    scramble(model)
    model.train()
    model(**inputs(model)).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    after = codes(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@every_kind
def test_nothing_is_merged_into_codes_and_the_error_says_what_to_do(kind):
    model = get_peft_model(quantised(kind), CONFIG)
    scramble(model)
    expected, before = output(model), codes(model)

    for act in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"is quantised \(.*load the base model without quantisation"):
            act()

    assert not any(layer.merged for _, layer in adapted_layers(model))
    assert torch.equal(output(model), expected)
    after = codes(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@every_kind
def test_an_adapter_made_around_codes_merges_in_the_model_without_them(kind, tmp_path):
    model = get_peft_model(quantised(kind), CONFIG)
    scramble(model)
    model.save_pretrained(tmp_path)
    plain = llama(hidden_size=64, intermediate_size=64)

    plain.load_adapter(str(tmp_path))

    expected = output(plain)
    for _, layer in adapted_layers(plain):
        layer.merge()
    torch.testing.assert_close(output(plain), expected, atol=1e-4, rtol=1e-4)
