"""Promises of `lightning_pfl.adapters.export`: a folder that plain PEFT reads, with nothing in it that runs."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from lightning_pfl.adapters import (
    Additive,
    CoLoraConfig,
    InputGate,
    StaticGate,
    add_global_branch,
    export_adapter,
    inject,
    set_bases,
)
from tests.adapters.tiny import FAMILIES, llama, mlp, output, scramble

CONFIG = CoLoraConfig(r=4, alpha=8, num_blocks=2)


def read(base, path, **how):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys
        return PeftModel.from_pretrained(base, path, **how)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "mlp"])
@pytest.mark.parametrize("gate", [None, StaticGate(Additive()), InputGate()], ids=["alone", "static", "input"])
def test_an_injected_module_is_read_back_by_peft_with_the_same_output(tmp_path, family, gate, low_cpu_mem_usage):
    build = {**FAMILIES, "mlp": mlp}[family]
    model = build()
    inject(model, CoLoraConfig(r=4, alpha=8, num_blocks=2, **({"gate": gate, "global_branch": True} if gate else {})))
    scramble(model)

    export_adapter(model, tmp_path / "adapter")

    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_manifest.json",
        "adapter_model.safetensors",
    }
    loaded = read(build(), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    # tensors that lie in the file's memory may be aligned otherwise, which costs a product its last bit
    exact = {"atol": 1e-6, "rtol": 1e-6} if low_cpu_mem_usage else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(output(loaded), output(model), **exact)
    ours, theirs = model.state_dict(), loaded.get_base_model().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())
    assert not any(p.requires_grad for p in loaded.parameters())


def test_the_folder_is_the_one_that_peft_itself_would_write(tmp_path):
    from safetensors.torch import load_file

    model = get_peft_model(llama(), CONFIG)
    scramble(model)
    model.save_pretrained(tmp_path / "theirs")
    export_adapter(model, tmp_path / "ours")

    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    # PEFT adds where a class it does not know is found; the model is passed to it anyway
    assert {**ours, "auto_mapping": None} == {**theirs, "auto_mapping": None}


def test_the_inner_model_of_a_larger_module_is_exported_under_its_own_names(tmp_path):
    outer = nn.ModuleDict({"net": llama(), "head": nn.Linear(16, 2)})
    inject(outer, CONFIG)
    scramble(outer)

    export_adapter(outer["net"], tmp_path, base_model_name_or_path="family/base")

    assert torch.equal(output(read(llama(), tmp_path)), output(outer["net"]))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "family/base"


def test_an_exported_adapter_carries_aligned_bases_and_can_be_trained_on(tmp_path):
    model = mlp()
    inject(model, CONFIG)
    scramble(model)
    add_global_branch(model)
    set_bases(model, {"main/0/linear": (torch.randn(4, 8), torch.randn(8, 4))})
    export_adapter(model, tmp_path)

    loaded = read(mlp(), tmp_path, is_trainable=True)

    assert torch.equal(output(loaded), output(model))
    trained = {name.split(".")[-2] for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {"colora_P", "colora_Q", "colora_A", "colora_B", "colora_gate"}


def test_an_adapter_for_another_model_is_refused_on_loading(tmp_path):
    model = mlp()
    inject(model, CONFIG)
    export_adapter(model, tmp_path)

    with pytest.raises(ValueError, match="made for a model with the layers"):
        PeftModel.from_pretrained(llama(), tmp_path)
