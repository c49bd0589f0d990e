"""Merged models that transformers alone loads, in every family, and what happens where Q has no place."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM, OPTForCausalLM

from lightning_pfl.adapters import (
    Additive,
    AsClass,
    CoLoraConfig,
    DropBias,
    InputGate,
    StaticGate,
    add_global_branch,
    export_merged,
    inject,
    merged_state,
)
from tests.adapters.tiny import BLOCKS, FAMILIES, inputs, llama, mlp, opt, output, qwen2, scramble

TOLERANCE = {torch.float64: 1e-14, torch.float32: 3e-6, torch.bfloat16: 0.15}
WAY_OUT = {
    "qwen2": {"if_no_bias": AsClass(LlamaForCausalLM)},
    "whisper": {"if_no_bias": DropBias()},  # of its keys, which moves all scores of a query alike: softmax drops it too
}
HOMELESS = {  # a layer of each that has no place for a bias, whatever the config says
    "gemma3": "model.layers.1.mlp.down_proj",
    "t5": "decoder.block.1.layer.0.SelfAttention.k",
    "whisper": "model.decoder.layers.1.encoder_attn.k_proj",
    "resnet": "resnet.encoder.stages.0.layers.1.layer.0.convolution",
    "efficientnet": "efficientnet.encoder.blocks.1.expansion.expand_conv",
}
PLACED = [name for name in FAMILIES if name not in HOMELESS or name in WAY_OUT]
ROUNDED = ["llama", "gpt2", "llava", "convnext"]  # linear both ways round, the deepest, convolutions


def adapted(build, *, dtype=torch.float32, gate=None, **more):
    model = build().to(dtype)
    config = CoLoraConfig(r=4, alpha=8, num_blocks=2, **({"gate": gate, "global_branch": True} if gate else {}), **more)
    inject(model, config)
    scramble(model)
    return model


def off(found, expected):
    return ((found - expected).double().norm() / expected.double().norm()).item()


@pytest.mark.parametrize("gate", [None, StaticGate(), StaticGate(Additive())], ids=["alone", "static", "additive"])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float64) for family in PLACED),
        *((family, dtype) for family in ROUNDED for dtype in (torch.float32, torch.bfloat16)),
    ],
    ids=str,
)
def test_the_folder_alone_gives_the_same_logits_within_the_stated_tolerance(tmp_path, family, gate, dtype):
    """In bfloat16 the unmerged model itself is off from float64 by as much as the merged one from it."""
    model = adapted(FAMILIES[family], dtype=dtype, gate=gate, blocks=BLOCKS.get(family))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = output(model)

    export_merged(model, tmp_path, **WAY_OUT.get(family, {}))

    kind = LlamaForCausalLM if family == "qwen2" else type(model)
    loaded, told = kind.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert off(output(loaded), expected) < TOLERANCE[dtype]
    assert off(output(FAMILIES[family]().to(dtype)), expected) > 3 * TOLERANCE[dtype]
    assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any("colora" in name or "base_layer" in name for name in loaded.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def with_a_head(family):
    model = FAMILIES[family]()
    inject(model, CoLoraConfig(r=4, num_blocks=0, target_modules=["lm_head"]))
    scramble(model)
    return model


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma3", "t5"])
def test_a_head_that_was_tied_to_the_embeddings_is_written_as_one_of_its_own(tmp_path, family):
    model = with_a_head(family)
    expected = output(model)

    export_merged(model, tmp_path)

    loaded = type(model).from_pretrained(tmp_path)
    assert off(output(loaded), expected) < TOLERANCE[torch.float32]
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert loaded.lm_head.weight is not loaded.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


def test_a_head_whose_adapter_does_nothing_stays_tied(tmp_path):
    model = FAMILIES["gpt2"]()
    inject(model, CoLoraConfig(r=4, num_blocks=0, target_modules=["lm_head"]))

    export_merged(model, tmp_path)

    assert type(model).from_pretrained(tmp_path).config.tie_word_embeddings


class ScaledIfTied(OPTForCausalLM):
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * (0.5 if self.config.tie_word_embeddings else 1)
        return found


def test_a_class_that_computes_something_else_with_a_head_of_its_own_is_refused(tmp_path):
    model = ScaledIfTied(opt().config)
    inject(model, CoLoraConfig(r=4, num_blocks=0, target_modules=["lm_head"]))
    scramble(model)

    with pytest.raises(ValueError, match=r"cannot be written as ScaledIfTied.*logits differ by 1 .*`export_lora`"):
        export_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_tied_head_of_a_model_that_reads_no_tokens_is_refused(tmp_path):
    model = FAMILIES["whisper"]()
    inject(model, CoLoraConfig(r=4, num_blocks=0, target_modules=["proj_out"]))
    scramble(model)

    with pytest.raises(ValueError, match=r"cannot be compared .* reads `input_features`.*`export_lora`"):
        export_merged(model, tmp_path / "merged")


def test_a_merged_state_says_that_a_tied_head_is_not_tied_any_more(caplog):
    state = merged_state(with_a_head("gpt2"))

    assert not torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])
    assert "ties `lm_head.weight` to parameters elsewhere" in caplog.text


def test_it_loads_in_a_process_that_knows_nothing_of_this_package(tmp_path):
    model = adapted(llama, gate=StaticGate())
    export_merged(model, tmp_path / "merged")
    torch.save({**inputs(model), "expected": output(model)}, tmp_path / "case.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; case = torch.load(sys.argv[2])\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.testing.assert_close(model(case['input_ids']).logits, case['expected'], rtol=1e-4, atol=1e-5)\n"
        "assert not {'lightning_pfl', 'peft'} & set(sys.modules)"
    )

    subprocess.run([sys.executable, "-c", code, tmp_path / "merged", tmp_path / "case.pt"], check=True, timeout=300)


def test_the_config_says_only_what_is_needed_and_other_biases_are_zero(tmp_path):
    """Q in attention alone: `mlp_bias` stays off; a layer outside the shared blocks gets zeros."""
    model = adapted(llama, target_modules=["q_proj", "v_proj"])
    export_merged(model, tmp_path)

    loaded = LlamaForCausalLM.from_pretrained(tmp_path)

    assert (loaded.config.attention_bias, loaded.config.mlp_bias) == (True, False)
    assert (model.config.attention_bias, model.config.mlp_bias) == (False, False)
    first, second = (loaded.model.layers[index].self_attn for index in (0, 1))
    assert not first.q_proj.bias.any()
    assert not second.k_proj.bias.any()
    assert second.q_proj.bias.any()


def test_without_a_trained_q_no_bias_appears(tmp_path):
    """A plain LoRA-like adapter leaves the architecture as it is, in any family."""
    model = adapted(FAMILIES["gemma3"])
    for name, parameter in model.named_parameters():
        if "colora_Q" in name:
            parameter.data.zero_()

    export_merged(model, tmp_path)

    loaded = type(model).from_pretrained(tmp_path)
    assert not loaded.config.attention_bias
    assert off(output(loaded), output(model)) < 3e-6


@pytest.mark.parametrize("family", HOMELESS)
def test_a_class_without_room_for_q_refuses_and_says_what_can_be_done(tmp_path, family):
    model = adapted(FAMILIES[family], blocks=BLOCKS.get(family))

    with pytest.raises(ValueError, match=rf"no place for .*`{HOMELESS[family]}.bias`.*DropBias\(\)"):
        export_merged(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_dropped_biases_are_told_and_all_else_is_there(tmp_path, caplog):
    """What is left out is exactly the MLPs' Q: without those the outputs are equal."""
    model = adapted(FAMILIES["gemma3"])
    with caplog.at_level(logging.WARNING, logger="lightning_pfl"):
        export_merged(model, tmp_path, if_no_bias=DropBias())

    loaded = type(model).from_pretrained(tmp_path)
    assert "Biases of 6 layers are left out" in caplog.text
    assert off(output(loaded), output(model)) > 1e-2
    for name, parameter in model.named_parameters():
        if "colora_Q" in name and ".mlp." in name:
            parameter.data.zero_()
    assert off(output(loaded), output(model)) < 3e-6


def mistral(window):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=window, rms_norm_eps=1e-3)).eval()


def test_another_class_must_compute_the_same(tmp_path):
    """Mistral is a Llama, settings included, unless its window slides; an OPT is none."""
    model = adapted(lambda: mistral(None))
    export_merged(model, tmp_path, if_no_bias=AsClass(LlamaForCausalLM))
    assert off(output(LlamaForCausalLM.from_pretrained(tmp_path)), output(model)) < 3e-6

    with pytest.raises(ValueError, match="sliding windows"):
        export_merged(adapted(lambda: mistral(4)), tmp_path, if_no_bias=AsClass(LlamaForCausalLM))
    with pytest.raises(ValueError, match="cannot be written as OPTForCausalLM"):
        export_merged(adapted(qwen2), tmp_path, if_no_bias=AsClass(OPTForCausalLM))


def test_another_class_of_the_same_names_that_computes_something_else_is_found_out(tmp_path):
    """Names alone would let it pass."""

    class Other(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits = found.logits * 1.01
            return found

    with pytest.raises(ValueError, match=r"their logits differ by 0.01"):
        export_merged(adapted(qwen2), tmp_path, if_no_bias=AsClass(Other))


def test_a_gate_that_reads_the_input_is_refused_before_anything_is_written(tmp_path):
    model = adapted(llama, gate=InputGate())

    with pytest.raises(ValueError, match=r"cannot be merged.*StaticGate\(\)"):
        export_merged(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("wrap", ["peft", "inside"])
def test_the_model_is_found_in_pefts_wrapper_and_in_a_larger_module(tmp_path, wrap):
    if wrap == "peft":
        whole = get_peft_model(opt(), CoLoraConfig(r=4, num_blocks=2))
        inner = whole.base_model.model
    else:
        inner = opt()
        whole = nn.ModuleDict({"net": inner, "head": nn.Linear(16, 2)})
        inject(inner, CoLoraConfig(r=4, num_blocks=2))
    scramble(whole)

    export_merged(whole, tmp_path)

    assert off(output(OPTForCausalLM.from_pretrained(tmp_path)), output(inner)) < 3e-6


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 6),
    widths=st.tuples(st.integers(6, 12), st.integers(6, 12)),
    gate=st.sampled_from([None, StaticGate(), StaticGate(Additive())]),
    is_shared=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_merged_is_unmerged_for_any_p_and_q(rank, widths, gate, is_shared, has_bias, seed):
    """P is not symmetric and Q not zero; in place, out of place, and back to the untouched layer."""
    torch.manual_seed(seed)
    module = nn.ModuleDict({"fc": nn.Linear(*widths, bias=has_bias)}).double()
    placement = {"fc": "main/0/fc" if is_shared else None}
    more = {"gate": gate, "global_branch": True} if gate else {}
    inject(module, CoLoraConfig(r=rank, alpha=3, placement=placement, base_identity="b", **more))
    scramble(module, seed=seed, scale=1.0)
    x = torch.randn(3, widths[0], dtype=torch.float64)
    layer = module["fc"]
    if is_shared:
        P = layer.colora_P["default"]
        assert rank == 1 or not torch.equal(P, P.T)
        assert layer.colora_Q["default"].all()

    with torch.no_grad():
        expected = layer(x)
        state = merged_state(module)
        merged = nn.functional.linear(x, state["fc.weight"], state.get("fc.bias"))
        layer.merge()
        in_place = layer(x)
        layer.unmerge()

    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(in_place, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer(x), expected)
    assert ("fc.bias" in state) == (is_shared or has_bias)


@pytest.mark.parametrize("is_shared", [True, False], ids=["colora", "lora"])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 5, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(3, 5, (3, 2), dilation=(1, 2), padding=2, padding_mode="circular"),
        nn.Conv3d(3, 5, (1, 2, 3), padding="same", bias=False),
    ],
    ids=["1d", "2d", "3d"],
)
def test_a_merged_convolution_is_one_kernel_and_one_bias(layer, is_shared):
    plain = nn.ModuleDict({"conv": copy.deepcopy(layer)}).double()
    module = copy.deepcopy(plain)
    placement = {"conv": "main/0/conv" if is_shared else None}
    inject(module, CoLoraConfig(r=3, alpha=3, placement=placement, base_identity="b", global_branch=True))
    scramble(module, scale=1.0)
    x = torch.randn(2, 3, *[6] * (layer.weight.dim() - 2), dtype=torch.float64)

    state = merged_state(module)

    if is_shared and plain["conv"].bias is None:
        plain["conv"].bias = nn.Parameter(torch.empty(5, dtype=torch.float64))
    assert not torch.equal(state["conv.weight"], plain["conv"].weight)
    plain.load_state_dict(state)
    torch.testing.assert_close(plain["conv"](x), module["conv"](x), rtol=1e-12, atol=1e-12)


def test_a_network_of_convolutions_keeps_all_but_q(tmp_path):
    """A ResNet's convolutions have no biases; without Q its folder computes the same."""
    model = adapted(FAMILIES["resnet"], dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if "colora_Q" in name:
            parameter.data.zero_()

    export_merged(model, tmp_path)

    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert off(output(loaded), output(model)) < 1e-14


def test_a_module_of_ones_own_has_a_merged_state_that_its_class_loads(tmp_path):
    """Also while the layers are merged in place, and with adapters that came in by global branch."""
    model = mlp()
    inject(model, CoLoraConfig(r=4, alpha=8, num_blocks=2))
    add_global_branch(model)
    scramble(model)
    expected = output(model)

    plain = mlp()
    plain.load_state_dict(merged_state(model))
    assert off(output(plain), expected) < 3e-6

    for layer in model.modules():
        if hasattr(layer, "merge"):
            layer.merge()
    plain.load_state_dict(merged_state(model))
    assert off(output(plain), expected) < 3e-6
    with pytest.raises(TypeError, match="merged_state"):
        export_merged(model, tmp_path)
