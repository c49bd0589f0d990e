"""A folder with an alignment says what it covers, and a damaged or foreign one says what is wrong."""

from __future__ import annotations

import json
import math

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
        (
            lambda about: about.pop("anchor"),
            r"An alignment is wrong in `.*alignment\.json` at .*'anchor' is a required property",
        ),
        (lambda about: about.update(models=[]), r"at \['models'\]: \[\] is not of type 'object'"),
        (lambda about: about.update(version=1), "of format 1, but this release reads 2"),
        (lambda about: about["report"][0].update(layer="vision/q"), r"at \['report'\]\[0\]\['layer'\]"),
        (lambda about: about["models"]["big"]["layers"][0].update(rank="2"), r"'2' is not of type 'integer'"),
        (lambda about: about.update(anchor="other"), "names the anchor `other`, but has bases of"),
        (lambda about: about["models"]["big"]["layers"][0].update(d_in=8), r"`big\|vision/1/q\|A` must be \[2, 8\]"),
        (lambda about: about["models"]["big"]["layers"][0].update(role="v"), "do not belong together"),
        (lambda about: about["report"][0].pop("after"), "'after' is a required property"),
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
    with pytest.raises(ValueError, match="An alignment must be JSON"):
        Alignment.load(folder)
    (folder / "alignment.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no alignment\.json"):
        Alignment.load(folder)


def test_bases_of_another_dtype_are_refused(folder):
    tensors = load_file(folder / "alignment.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "alignment.safetensors")
    with pytest.raises(ValueError, match=r"must be float32, but is torch\.float16"):
        Alignment.load(folder)


def test_what_is_missed_without_end_comes_back(tmp_path):
    """JSON has no infinity, and other parsers than Python's refuse it."""
    nothing = Errors(math.inf, math.inf, math.inf, 0.0)
    fit = LayerFit("big", "main/0/o", 90, nothing, nothing)
    Alignment("small", {"small": {}, "big": {}}, (fit,), {}).save(tmp_path)
    assert "Infinity" not in (tmp_path / "alignment.json").read_text()
    assert Alignment.load(tmp_path).report == (fit,)


def test_another_rank_than_the_alignments_is_refused():
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    inject(module, CoLoraConfig(r=2, num_blocks=1, private_layers=False, base_identity="mlp", target_modules=["0"]))
    bases = {"mlp": {"main/0/linear": (torch.ones(3, 4), torch.ones(4, 3))}}
    with pytest.raises(ValueError, match=r"made for rank 3 .* have rank 2\. Use rank=3"):
        Alignment("mlp", bases, (), {}).apply(module)
