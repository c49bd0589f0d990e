"""The research code's tensor layout: there and back, and its own formula on the tensors that are written."""

import pytest
import torch

from lightning_pfl.adapters import Additive, CoLoraConfig, InputGate, StaticGate, from_reference, inject, to_reference
from lightning_pfl.adapters.injection import adapted_layers
from tests.adapters.tiny import FAMILIES, llama, mlp, output, scramble


def adapted(build=mlp, *, gate=None, seed=5, **more):
    model = build()
    inject(
        model,
        CoLoraConfig(r=4, alpha=8, num_blocks=2, **({"gate": gate, "global_branch": True} if gate else {}), **more),
    )
    scramble(model, seed=seed)
    return model


def reference_delta(state, name, x, scale):
    """What one layer adds, as the research code does it: rows times matrices, two adapters, one weight per sample."""

    def branch(number):
        z = x @ state[f"{name}.lora{number}_A.default.weight"].T
        if f"{name}.lora{number}_P.default" in state:
            z = z @ state[f"{name}.lora{number}_P.default"] + state[f"{name}.lora{number}_Q.default"]
        return scale * z @ state[f"{name}.lora{number}_B.default.weight"].T

    g = torch.sigmoid(x @ state[f"{name}.lora_w_gate.default"])
    return g * branch(1) + (1 - g) * branch(2)


@pytest.mark.parametrize("gate", [None, StaticGate(), InputGate()], ids=["alone", "static", "input"])
def test_the_research_codes_formula_on_what_is_written_gives_our_layers_output(gate):
    """P not symmetric, Q not zero; a static gate at 0, an input gate at a weight of its own."""
    model = adapted(gate=gate)
    if isinstance(gate, StaticGate):
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.data.zero_()
    state = to_reference(model)
    x = torch.randn(5, 8)

    for name, layer in adapted_layers(model):
        with torch.no_grad():
            ours = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(reference_delta(state, name, x, scale=2.0), ours, rtol=1e-5, atol=1e-5)


def test_the_layout_has_the_names_and_shapes_of_the_research_code():
    state = to_reference(adapted(gate=InputGate()))

    assert {key: tuple(tensor.shape) for key, tensor in state.items() if key.startswith("2.")} == {
        "2.lora1_A.default.weight": (4, 8),
        "2.lora1_B.default.weight": (8, 4),
        "2.lora1_P.default": (4, 4),
        "2.lora1_Q.default": (1, 4),
        "2.lora2_A.default.weight": (4, 8),
        "2.lora2_B.default.weight": (8, 4),
        "2.lora2_P.default": (4, 4),
        "2.lora2_Q.default": (1, 4),
        "2.lora_w_gate.default": (8, 1),
    }
    assert torch.equal(state["2.lora1_A.default.weight"], state["2.lora2_A.default.weight"])
    assert not any("_P" in key for key in state if key.startswith("0."))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("gate", [None, InputGate()], ids=["alone", "input"])
def test_there_and_back_every_output_is_the_same(family, gate):
    """Into a module with other bases, adapters and gates, through its own names."""
    model, other = adapted(FAMILIES[family], gate=gate), adapted(FAMILIES[family], gate=gate, seed=6)
    for _, layer in adapted_layers(other):
        for basis in (layer.colora_basis_A, layer.colora_basis_B):
            for tensor in basis.values():
                tensor.normal_()
    assert not torch.allclose(output(model), output(other))

    from_reference(other, to_reference(model))

    assert torch.equal(output(model), output(other))
    assert all(
        layer.colora_aligned["default"]
        for _, layer in adapted_layers(other)
        if layer.colora_address["default"] is not None
    )


def test_other_prefixes_suffixes_dtypes_and_unused_tensors_are_understood():
    """As a PEFT model's state in bfloat16 would be, with the noise weights, and P and Q of conventional layers."""
    model, other = adapted(llama, gate=InputGate()), adapted(llama, gate=InputGate(), seed=6)
    state = {f"base_model.model.{key}": tensor.bfloat16() for key, tensor in to_reference(model).items()}
    state = {key.replace(".default", ""): tensor for key, tensor in state.items()}
    for name, layer in adapted_layers(model):
        state[f"base_model.model.{name}.lora_w_noise"] = torch.ones(layer.in_features, 1)
        if layer.colora_address["default"] is None:
            state[f"base_model.model.{name}.lora1_P"] = torch.eye(4)
            state[f"base_model.model.{name}.lora2_Q"] = torch.ones(1, 4)

    from_reference(other, state)

    torch.testing.assert_close(output(other), output(model), rtol=0.1, atol=0.05)
    assert other.model.layers[1].mlp.up_proj.colora_P["default"].dtype == torch.float32


def test_a_file_with_one_adapter_counts_for_both_branches():
    """The aligned initialisations are such files: A, B, and P and Q at zero, without a gate."""
    model, other = adapted(gate=None), adapted(gate=InputGate(), seed=6)
    state = {key.replace("lora2", "lora"): tensor for key, tensor in to_reference(model).items() if "lora2" in key}

    from_reference(other, state)

    torch.testing.assert_close(output(other), output(model))
    torch.testing.assert_close(other[2].colora_global_P["default"], model[2].colora_P["default"].data)


def of(change=lambda state: None):
    state = to_reference(adapted(gate=InputGate()))
    change(state)
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (of(change=lambda s: s.update({"2.weight": torch.ones(1)})), "`2.weight` is no name"),
        (
            of(change=lambda s: s.update({"9.lora1_A.default.weight": torch.ones(4, 8)})),
            "layer `9` of the state fits none",
        ),
        (of(change=lambda s: [s.pop(key) for key in list(s) if key.startswith("4.")]), r"lacks \['4'\]"),
        (of(change=lambda s: s.pop("2.lora1_P.default")), "no lora1_P at `2`"),
        (of(change=lambda s: s["2.lora1_A.default.weight"].zero_()), "A of `2` must be the same in lora1 and lora2"),
        (of(change=lambda s: s.update({"0.lora2_A.default.weight": torch.ones(3, 8)})), r"shape \(4, 8\).*\(3, 8\)"),
    ],
    ids=["name", "extra", "missing", "half", "bases", "shape"],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_written(state, message):
    model = adapted(gate=InputGate(), seed=6)
    before = output(model)

    with pytest.raises(ValueError, match=message):
        from_reference(model, state)
    assert torch.equal(output(model), before)


def test_what_the_layout_has_no_place_for_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"add their branches.*Convex"):
        to_reference(adapted(gate=StaticGate(Additive())))
    with pytest.raises(ValueError, match=r"is the number .*InputGate\(\)"):
        to_reference(adapted(gate=StaticGate()))
    with pytest.raises(ValueError, match=r"no global branch to hold it.*global_branch=True"):
        from_reference(adapted(), of())
    with pytest.raises(ValueError, match=r"is a weight on the input.*InputGate\(\)"):
        from_reference(adapted(gate=StaticGate()), of())
