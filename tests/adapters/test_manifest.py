"""Promises of `lightning_pfl.adapters.manifest`: a folder is loaded into what it was made for, or refused."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_pfl.adapters import CoLoraConfig, add_global_branch, export_adapter, inject, load_adapter
from tests.adapters.tiny import llama, mlp, output, scramble

CONFIG = CoLoraConfig(r=4, alpha=8, num_blocks=2, exclude_modules="(x+x+)+y")


@pytest.fixture
def folder(tmp_path):
    model = mlp()
    inject(model, CONFIG)
    scramble(model)
    export_adapter(model, tmp_path / "adapter", client="ward-3", round=4)
    return tmp_path / "adapter"


def change(folder, name, **values):
    """Change a JSON file as somebody would who also puts the manifest in order."""
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    refresh(folder)


def refresh(folder):
    path = folder / "adapter_manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("build", [mlp, llama])
@pytest.mark.parametrize("gated", [False, True])
def test_an_exported_adapter_gives_the_same_output(tmp_path, build, gated):
    model = build()
    inject(model, CoLoraConfig(r=4, alpha=8, num_blocks=2))
    if gated:
        add_global_branch(model)
    scramble(model)
    export_adapter(model, tmp_path, client="ward-3", round=4)
    again = build()

    manifest = load_adapter(again, tmp_path)

    torch.testing.assert_close(output(again), output(model), atol=0, rtol=0)
    assert (manifest["client"], manifest["round"]) == ("ward-3", 4)
    assert set(manifest["ranks"].values()) == {4}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_file_is_refused(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}` must have the sha256"):
        load_adapter(mlp(), folder)


def test_other_base_weights_are_refused_and_another_dtype_is_not_compared(folder):
    other = mlp()
    with torch.no_grad():
        other[0].weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="trained on other weights"):
        load_adapter(other, folder)
    load_adapter(mlp().bfloat16(), folder)


def test_another_base_model_is_refused(folder):
    with pytest.raises(ValueError, match="does not have"):
        load_adapter(llama(), folder)


def test_a_folder_of_two_exports_is_refused(folder):
    change(folder, "adapter_config.json", base_identity="another")
    with pytest.raises(ValueError, match="do not belong together"):
        load_adapter(mlp(), folder)


def test_tensors_that_the_config_does_not_describe_are_refused(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors))
    save_file({**tensors, "base_model.model.other": torch.ones(1)}, path)
    refresh(folder)
    with pytest.raises(ValueError, match="differs in"):
        load_adapter(mlp(), folder)
    save_file({**tensors, first: torch.ones(1, 1, 1)}, path)
    refresh(folder)
    with pytest.raises(ValueError, match="must have the shape"):
        load_adapter(mlp(), folder)


@pytest.mark.parametrize(
    "values", [{"r": "4"}, {"r": -1}, {"alpha": None}, {"placement": {"0": "a"}}, {"gate": {"class": "os.system"}}]
)
def test_a_config_that_is_none_is_refused(folder, values):
    change(folder, "adapter_config.json", **values)
    with pytest.raises(ValueError, match="description of adapters"):
        load_adapter(mlp(), folder)


def test_a_pattern_that_takes_for_ever_is_not_asked(folder):
    """(x+x+)+y against a long name of x takes years; names decide here, and the config's patterns are left alone."""
    slow = torch.nn.Sequential()
    for name, child in mlp().named_children():
        slow.add_module(name, child)
    slow.add_module("x" * 64, torch.nn.Linear(3, 3))
    load_adapter(slow, folder)


def test_a_folder_without_a_manifest_is_not_ours(folder):
    (folder / "adapter_manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_manifest\.json"):
        load_adapter(mlp(), folder)


def test_a_clients_id_that_is_no_folder_is_refused(folder, tmp_path):
    model = mlp()
    inject(model, CONFIG)
    with pytest.raises(ValueError, match=r"\['client'\]"):
        export_adapter(model, tmp_path / "x", client="../ward")
