"""Adapters as plain LoRA: read by PEFT's own layers, with the same outputs."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from lightning_pfl.adapters import Additive, CoLoraConfig, InputGate, StaticGate, export_lora, inject
from lightning_pfl.adapters.injection import adapted_layers
from tests.adapters.tiny import BLOCKS, FAMILIES, llama, mlp, output, resnet, scramble

BUILDS = {**FAMILIES, "mlp": mlp}


def adapted(build, *, gate=None, **more):
    model = build()
    inject(
        model,
        CoLoraConfig(r=4, alpha=8, num_blocks=2, **({"gate": gate, "global_branch": True} if gate else {}), **more),
    )
    scramble(model)
    return model


def read(build, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lora_bias=True.*")  # PEFT: such a LoRA cannot be merged
        return PeftModel.from_pretrained(build(), path)


def off(found, expected):
    return ((found - expected).double().norm() / expected.double().norm()).item()


@pytest.mark.parametrize("gate", [None, StaticGate(), StaticGate(Additive())], ids=["alone", "static", "additive"])
@pytest.mark.parametrize("family", BUILDS)
def test_pefts_own_lora_gives_the_same_outputs(tmp_path, family, gate):
    """Rank r without a global branch, 2r with; Q as the bias of B."""
    model = adapted(BUILDS[family], gate=gate, blocks=BLOCKS.get(family))

    written = export_lora(model, tmp_path)

    loaded = read(BUILDS[family], tmp_path)
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert loaded.peft_config["default"].r == written.rank == (8 if gate else 4)
    assert written.has_bias
    assert not written.lost
    assert sum(isinstance(layer, LoraLayer) for layer in loaded.modules()) == len(list(adapted_layers(model)))
    assert off(output(loaded), output(model)) < 3e-6


def test_without_a_trained_q_there_is_no_bias_and_peft_merges_it(tmp_path):
    model = adapted(llama, gate=StaticGate())
    for name, tensor in model.state_dict().items():
        if "colora_Q" in name or "colora_global_Q" in name:
            tensor.zero_()

    written = export_lora(model, tmp_path)

    assert not written.has_bias
    merged = PeftModel.from_pretrained(llama(), tmp_path).merge_and_unload()
    assert off(output(merged), output(model)) < 3e-6


@pytest.mark.parametrize("rank", [2, 6, 16])
def test_a_rank_of_ones_own_takes_the_best_of_each_layer_and_says_what_it_loses(tmp_path, rank):
    """Layer by layer against the truncated SVD of the dense product, whose error is what is told."""
    model = adapted(mlp, gate=StaticGate())

    written = export_lora(model, tmp_path, rank=rank)

    loaded = read(mlp, tmp_path)
    assert written.rank == rank
    for name, layer in adapted_layers(model):
        lora = loaded.base_model.model.get_submodule(name)
        assert lora.lora_A["default"].weight.shape == (rank, 8)
        values = torch.linalg.svdvals(layer.delta_weight("default")[0])
        error = (lora.get_delta_weight("default") - layer.delta_weight("default")[0]).norm()
        torch.testing.assert_close(error, values[rank:].norm(), rtol=1e-4, atol=1e-5)
        assert written.lost.get(name, 0.0) == pytest.approx((values[rank:].norm() / values.norm()).item(), abs=1e-5)
    if rank == 16:
        assert not written.lost
        assert off(output(loaded), output(model)) < 3e-6


def test_convolutions_are_cut_to_a_rank_too(tmp_path):
    model = adapted(resnet, gate=StaticGate())

    written = export_lora(model, tmp_path, rank=2)

    loaded = read(resnet, tmp_path)
    assert written.lost
    for name, layer in adapted_layers(model):
        lora = loaded.base_model.model.get_submodule(name)
        delta = layer.delta_weight("default")[0].view_as(layer.get_base_layer().weight)
        error = (lora.get_delta_weight("default") - delta).norm() / delta.norm()
        assert error.item() == pytest.approx(written.lost.get(name, 0.0), abs=1e-5)


def test_the_inner_model_and_where_it_comes_from(tmp_path):
    outer = nn.ModuleDict({"net": llama(), "head": nn.Linear(16, 2)})
    inject(outer["net"], CoLoraConfig(r=4, num_blocks=2))
    scramble(outer)

    export_lora(outer, tmp_path, base_model_name_or_path="family/base")

    assert LoraConfig.from_pretrained(tmp_path).base_model_name_or_path == "family/base"
    assert off(output(read(llama, tmp_path)), output(outer["net"])) < 3e-6


def test_what_cannot_be_plain_lora_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"weighs the branches anew.*StaticGate\(\)"):
        export_lora(adapted(llama, gate=InputGate()), tmp_path)
    with pytest.raises(ValueError, match="at least 1, but is 0"):
        export_lora(adapted(mlp), tmp_path, rank=0)
    with pytest.raises(ValueError, match="no Co-LoRA adapters"):
        export_lora(mlp(), tmp_path)


@pytest.mark.parametrize("more", [{"dilation": 2}, {"padding": 1, "padding_mode": "circular"}], ids=str)
def test_a_convolution_whose_patches_peft_would_not_read_is_refused(tmp_path, more):
    """PEFT makes A with the kernel, stride and padding of the layer, and nothing else."""
    module = nn.ModuleDict({"conv": nn.Conv2d(3, 5, 3, **more)})
    inject(module, CoLoraConfig(r=2, placement={"conv": "main/0/conv"}, base_identity="b"))

    with pytest.raises(ValueError, match=r"`conv` is a Conv2d with dilation.*other patches. Use `export_adapter`"):
        export_lora(module, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
