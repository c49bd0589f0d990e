"""Promises of `lightning_pfl.adapters.layer`: what one adapted layer computes, holds, trains and merges into."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_pfl.adapters import (
    Additive,
    CoLoraConfig,
    CoLoraConv,
    CoLoraLayer,
    CoLoraLinear,
    Convex,
    InputGate,
    StaticGate,
)
from tests.adapters.tiny import scramble

IN, OUT, R = 6, 5, 3
CONVOLUTIONS = {
    "1x1": lambda bias: nn.Conv2d(IN, OUT, 1, bias=bias),
    "3x3": lambda bias: nn.Conv2d(IN, OUT, 3, stride=2, padding=(2, 1), dilation=(2, 1), bias=bias),
    "reflected": lambda bias: nn.Conv2d(IN, OUT, 3, padding=1, padding_mode="reflect", bias=bias),
    "even": lambda bias: nn.Conv2d(IN, OUT, (2, 4), padding="same", bias=bias),
    "1d": lambda bias: nn.Conv1d(IN, OUT, 3, padding=1, bias=bias),
    "3d": lambda bias: nn.Conv3d(IN, OUT, (1, 3, 3), padding=(0, 1, 1), bias=bias),
}
SIZES = {"1d": (9,), "3d": (3, 7, 6)}


def make(kind="colora", base="linear", dtype=torch.float32, bias=True, **config) -> CoLoraLayer:
    torch.manual_seed(0)
    linear = Conv1D(OUT, IN) if base == "conv1d" else nn.Linear(IN, OUT, bias=bias)
    inner = CONVOLUTIONS[base](bias) if base in CONVOLUTIONS else linear
    placement = {"layer": "main/0/fc1" if kind == "colora" else None}
    settings = {"r": R, "alpha": 6, "placement": placement, "base_identity": "test", **config}
    leaf = CoLoraConv if base in CONVOLUTIONS else CoLoraLinear
    return leaf(inner.to(dtype), "default", "layer", CoLoraConfig(**settings))


def inputs(dtype=torch.float32, base="linear"):
    shape = (2, IN, *SIZES.get(base, (8, 7))) if base in CONVOLUTIONS else (2, 4, IN)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


every_kind = pytest.mark.parametrize("kind", ["colora", "conventional"])
every_base = pytest.mark.parametrize("base", ["linear", "conv1d", *CONVOLUTIONS])
every_convolution = pytest.mark.parametrize("base", CONVOLUTIONS)
every_branch = pytest.mark.parametrize(
    "config",
    [{}, {"global_branch": True}, {"global_branch": True, "gate": StaticGate(Additive())},
     {"global_branch": True, "gate": InputGate()}],
    ids=["alone", "convex", "additive", "input"],
)  # fmt: skip


@every_kind
@every_base
@every_branch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_adapter_starts_at_exactly_the_base_layer(kind, base, config, dtype):
    layer, x = make(kind, base, dtype, **config), inputs(dtype, base)

    output = layer(x)

    assert output.dtype == dtype
    assert torch.equal(output, layer.base_layer(x))


@every_kind
def test_the_forward_is_the_formula_of_two_branches_and_a_gate(kind):
    layer = make(kind, global_branch=True)
    scramble(layer)
    x, scale = inputs(), 6 / R
    beta = layer.colora_gate["default"].sigmoid()
    local, frozen = layer.local_tensors("default"), layer.global_tensors("default")

    def branch(t):
        if kind == "conventional":
            return x @ t["A"].T @ t["B"].T
        A, B = layer.colora_basis_A["default"], layer.colora_basis_B["default"]
        return ((x @ A.T) @ t["P"].T + t["Q"]) @ B.T

    expected = layer.base_layer(x) + scale * (beta * branch(frozen) + (1 - beta) * branch(local))
    torch.testing.assert_close(layer(x), expected)
    layer.colora_config["default"].gate = StaticGate(Additive())
    torch.testing.assert_close(layer(x), layer.base_layer(x) + scale * (beta * branch(frozen) + branch(local)))


@every_kind
@every_convolution
def test_around_a_convolution_the_formula_holds_for_every_patch(kind, base):
    """At each position, borders too: the base's output plus what a linear layer would add for the patch under it."""
    layer, x = make(kind, base, torch.float64, global_branch=True), inputs(torch.float64, base)
    scramble(layer)
    rows = layer.columns(x)  # [batch, *positions, d_in]
    plain = copy.deepcopy(layer)
    plain.patches = None

    expected = layer.base_layer(x) + plain._delta("default", rows).movedim(-1, 1)

    torch.testing.assert_close(layer(x), expected)
    weight = layer.base_layer.weight.flatten(1)
    torch.testing.assert_close(layer.base_layer(x).movedim(1, -1), rows @ weight.T + layer.base_layer.bias)


@every_convolution
def test_an_input_gate_around_a_convolution_reads_the_mean_over_all_positions(base):
    layer, x = make(base=base, global_branch=True, gate=InputGate()), inputs(base=base)
    scramble(layer)
    w = layer.colora_gate["default"].detach()

    assert w.shape == (IN,)
    for i in range(2):
        static = copy.deepcopy(layer)
        static.colora_config["default"].gate = StaticGate(Convex())
        static.colora_gate["default"] = nn.Parameter(x[i].flatten(1).mean(dim=1) @ w)
        torch.testing.assert_close(layer(x)[i], static(x[i]))


@every_kind
@pytest.mark.parametrize("config", [{}, {"global_branch": True, "gate": InputGate()}], ids=["alone", "input"])
def test_channels_may_lie_last_in_memory(kind, config):
    layer, x = make(kind, "3x3", **config), inputs(base="3x3")
    scramble(layer)
    expected = layer(x)
    layer.to(memory_format=torch.channels_last)

    output = layer(x.to(memory_format=torch.channels_last))

    torch.testing.assert_close(output, expected)
    assert output.is_contiguous(memory_format=torch.channels_last)
    if not config:
        layer.merge()
        assert layer.base_layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_model_may_ask_an_adapted_convolution_for_its_geometry():
    """As Whisper's encoder does, to know how long its input must be."""
    layer = make(base="3x3")

    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(layer, name) == getattr(layer.base_layer, name)


def test_an_input_gate_gives_every_sample_its_own_mixture():
    """Sample by sample, the layer with an input gate is the layer with a static gate of that sample's opening."""
    layer, x = make(global_branch=True, gate=InputGate()), inputs()
    scramble(layer)
    together = layer(x)
    w = layer.colora_gate["default"].detach()

    for i in range(2):
        static = copy.deepcopy(layer)
        static.colora_config["default"].gate = StaticGate(Convex())
        static.colora_gate["default"] = nn.Parameter(x[i].mean(dim=0) @ w)
        torch.testing.assert_close(together[i], static(x[i]))


@every_kind
def test_without_a_global_branch_there_is_no_gate_and_the_scale_is_whole(kind):
    layer = make(kind)
    scramble(layer)
    local = layer.local_tensors("default")

    assert not any("global" in name or "gate" in name for name in layer.state_dict())
    weight, _ = layer.delta_weight("default")
    if kind == "conventional":
        torch.testing.assert_close(weight, 6 / R * local["B"] @ local["A"])
    else:
        bases = layer.colora_basis_A["default"], layer.colora_basis_B["default"]
        torch.testing.assert_close(weight, 6 / R * bases[1] @ local["P"] @ bases[0])


@every_kind
def test_only_the_local_branch_and_the_gate_are_trained_whatever_is_switched(kind):
    layer = make(kind, global_branch=True)
    expected = {f"colora_{p}.default" for p in (["P", "Q"] if kind == "colora" else ["A", "B"])} | {
        "colora_gate.default"
    }

    def trained():
        return {n for n, p in layer.named_parameters() if p.requires_grad and "base_layer" not in n}

    assert trained() == expected
    layer.set_adapter("default")
    assert trained() == expected
    layer.enable_adapters(False)
    assert trained() == set()
    layer.enable_adapters(True)
    assert trained() == expected
    frozen = [n for n, _ in layer.named_buffers()]
    assert {n.split(".")[0] for n in frozen} >= {"colora_global_P" if kind == "colora" else "colora_global_A"}


@every_kind
def test_a_new_global_branch_is_a_copy_of_the_local_one(kind):
    layer = make(kind)
    scramble(layer)
    layer.add_global_branch("default")

    for letter, tensor in layer.global_tensors("default").items():
        assert torch.equal(tensor, layer.local_tensors("default")[letter])
        layer.local_tensors("default")[letter].data.add_(1)
        assert not torch.equal(tensor, layer.local_tensors("default")[letter])
    scramble(layer)
    before = layer.state_dict()["colora_gate.default"].clone()
    layer.add_global_branch("default")
    assert torch.equal(layer.colora_gate["default"], before)


def test_bases_depend_on_address_and_seed_only():
    one, other = make(), make(alpha=1, dropout=0.5)
    assert torch.equal(one.colora_basis_A["default"], other.colora_basis_A["default"])
    for changed in ({"seed": 1}, {"base_identity": "x"}, {"placement": {"layer": "main/1/fc1"}}):
        assert not torch.equal(one.colora_basis_A["default"], make(**changed).colora_basis_A["default"])


@every_kind
@every_base
@every_branch
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_merging_changes_nothing_but_the_weights(kind, base, config, bias, dtype, tolerance):
    layer = make(kind, base, dtype, bias, **config)
    scramble(layer)
    if isinstance(config.get("gate"), InputGate):
        with pytest.raises(ValueError, match="InputGate weighs the branches anew for every input"):
            layer.merge()
        assert not layer.merged
        return
    x = inputs(dtype, base)
    before, weight, old_bias = layer(x), layer.base_layer.weight, layer.base_layer.bias
    value = weight.clone()

    layer.merge(safe_merge=True)

    torch.testing.assert_close(layer.base_layer(x), before, atol=tolerance, rtol=tolerance)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.equal(weight, value), "the old tensor may be mapped from a file that others read"
    assert (layer.base_layer.bias is None) == (kind == "conventional" and not bias and base != "conv1d")
    layer.unmerge()
    assert layer.base_layer.weight is weight
    assert layer.base_layer.bias is old_bias
    assert torch.equal(layer(x), before)


def test_a_disabled_adapter_comes_back_out_of_the_weight():
    layer = make()
    scramble(layer)
    base = layer.base_layer(inputs())
    layer.merge()
    layer.enable_adapters(False)

    assert torch.equal(layer(inputs()), base)
    assert not layer.merged


def test_two_adapters_are_merged_and_rounded_once():
    layer = make(dtype=torch.bfloat16)
    layer.update_layer("second", "layer", CoLoraConfig(r=2, placement={"layer": None}, base_identity="test"))
    scramble(layer)
    layer.set_adapter(["default", "second"])
    deltas = [layer.delta_weight(name)[0] for name in ("default", "second")]
    expected = (layer.base_layer.weight.float() + deltas[0] + deltas[1]).bfloat16()

    layer.merge()

    assert torch.equal(layer.base_layer.weight, expected)


def test_a_broken_adapter_is_not_merged_if_asked_to_check():
    layer = make()
    layer.colora_P["default"].data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert not layer.merged


@every_kind
def test_adapters_stay_float32_in_a_bfloat16_model(kind):
    made, cast = make(kind, dtype=torch.bfloat16, global_branch=True), make(kind, global_branch=True)
    scramble(cast)
    exact = {n: t.clone() for n, t in cast.state_dict().items()}
    cast.to(torch.bfloat16)
    cast.half()

    for layer in (made, cast):
        kinds = {t.dtype for n, t in layer.state_dict().items() if "base_layer" not in n and "aligned" not in n}
        assert kinds == {torch.float32}
    assert cast.base_layer.weight.dtype == torch.float16
    assert all(torch.equal(t, exact[n]) for n, t in cast.state_dict().items() if "base_layer" not in n)
    cast.double()
    assert cast.colora_gate["default"].dtype == torch.float64


def test_both_branches_drop_the_same_inputs():
    """G = L and convex weights: whatever is dropped, the mixture is the branch alone with that one mask."""
    layer = make(global_branch=True, dropout=0.5)
    scramble(layer)
    for letter, tensor in layer.global_tensors("default").items():
        tensor.copy_(layer.local_tensors("default")[letter].detach())
    alone = make(dropout=0.5)
    alone.load_state_dict({n: t for n, t in layer.state_dict().items() if n in alone.state_dict()})

    torch.manual_seed(0)
    mixed = layer(inputs())
    torch.manual_seed(0)
    torch.testing.assert_close(mixed, alone(inputs()))
    assert not torch.allclose(mixed, layer.eval()(inputs()))


def test_under_autocast_the_output_has_the_base_layers_dtype():
    layer = make(global_branch=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(inputs())
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, layer.base_layer(inputs()))
