"""A folder with an alignment says what it covers, and a damaged or foreign one says what is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_pfl.adapters import CoLoraConfig, inject
from lightning_pfl.adapters.aligned import Alignment, LayerFit
from lightning_pfl.adapters.fidelity import Errors

FIT = LayerFit("big", "vision/1/q", 90, Errors(2.0, 1.0, 1.5, 0.0), Errors(0.25, 0.5, 0.75, 0.875))


@pytest.fixture
def folder(tmp_path):
    bases = {
        "small": {"vision/1/q": (torch.ones(2, 3), torch.ones(4, 2)), "main/0/o": (torch.ones(2, 4), torch.ones(4, 2))},
        "big": {"vision/1/q": (torch.ones(2, 7), torch.ones(5, 2))},
    }
    Alignment("small", bases, (FIT,), {"big": ["main/0/k"]}).save(tmp_path)
    return tmp_path


def edit(folder, change):
    about = json.loads((folder / "alignment.json").read_text())
    change(about)
    (folder / "alignment.json").write_text(json.dumps(about))


def test_the_json_names_base_models_towers_blocks_roles_and_the_anchor(folder):
    about = json.loads((folder / "alignment.json").read_text())
    assert about["anchor"] == "small"
    assert about["models"]["big"] == {
        "layers": [{"tower": "vision", "block": 1, "role": "q", "rank": 2, "d_in": 7, "d_out": 5}],
        "unaligned": ["main/0/k"],
    }
    assert [layer["tower"] for layer in about["models"]["small"]["layers"]] == ["main", "vision"]
    assert "| big | vision | 1 | q | 2.00 → 0.25 |" in (folder / "report.md").read_text()
    loaded = Alignment.load(folder)
    assert loaded.report == (FIT,)
    assert loaded.unaligned == {"big": ["main/0/k"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.pop("anchor"), "is not what Alignment.save writes .KeyError: 'anchor'"),
        (lambda about: about.update(models=[]), "is not what Alignment.save writes"),
        (lambda about: about.update(anchor="other"), "names the anchor `other`, but has bases of"),
        (lambda about: about["models"]["big"]["layers"][0].update(d_in=8), r"`big\|vision/1/q\|A` must be \[2, 8\]"),
        (lambda about: about["models"]["big"]["layers"][0].update(role="v"), "do not belong together"),
        (lambda about: about["report"][0].pop("after"), "is not what Alignment.save writes"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        Alignment.load(folder)


def test_damaged_and_missing_files_are_refused(folder):
    tensors = load_file(folder / "alignment.safetensors")
    tensors["big|vision/1/q|A"][0, 0] = torch.nan
    save_file(tensors, folder / "alignment.safetensors")
    with pytest.raises(ValueError, match="is not finite"):
        Alignment.load(folder)
    (folder / "alignment.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(ValueError, match="is damaged"):
        Alignment.load(folder)
    (folder / "alignment.json").write_text("{")
    with pytest.raises(ValueError, match="JSONDecodeError"):
        Alignment.load(folder)
    (folder / "alignment.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no alignment\.json"):
        Alignment.load(folder)


def test_another_rank_than_the_alignments_is_refused():
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    inject(module, CoLoraConfig(r=2, num_blocks=1, private_layers=False, base_identity="mlp", target_modules=["0"]))
    bases = {"mlp": {"main/0/linear": (torch.ones(3, 4), torch.ones(4, 3))}}
    with pytest.raises(ValueError, match=r"made for rank 3 .* have rank 2\. Use rank=3"):
        Alignment("mlp", bases, (), {}).apply(module)
