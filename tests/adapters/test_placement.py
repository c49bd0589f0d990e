"""Promises of `lightning_pfl.adapters.placement`, on every family that the project names."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    LlamaModel,
)

from lightning_pfl.adapters.placement import last_blocks, place
from tests.adapters.tiny import BLOCKS, FAMILIES, llama, llava, mlp

GATED = {"q", "k", "v", "o", "gate", "up", "down"}
PLAIN = {"q", "k", "v", "o", "fc1", "fc2"}
CROSS = {"cross_q", "cross_k", "cross_v", "cross_o"}
CONVOLUTIONS = {"conv1", "conv2", "conv3"}
ROLES = {
    **{family: {"main": GATED} for family in ("llama", "gemma3", "qwen2", "llava")},
    **{family: {"main": PLAIN} for family in ("opt", "phi", "bert", "vit")},
    "gpt2": {"main": {"qkv", "o", "fc1", "fc2"}},
    "t5": {"encoder": GATED - {"down"} | {"fc2"}, "decoder": GATED - {"down"} | {"fc2"} | CROSS},
    "whisper": {"encoder": PLAIN, "decoder": PLAIN | CROSS},
    "clip": {"text": PLAIN, "vision": PLAIN},
    "resnet": {"main": CONVOLUTIONS},
    "convnext": {"main": {"fc1", "fc2"}},
    "efficientnet": {"main": {"expand", "squeeze", "excite", "project"}},
}
"""By family and tower; T5's `wo` is named alike in its plain and its gated form."""
HEADS = {"bert": "classifier", "vit": "classifier", "whisper": "proj_out", "clip": "text_projection",
         "resnet": "classifier.1", "convnext": "classifier", "efficientnet": "classifier"}  # fmt: skip
STAGED = {"resnet": ("stages.0.layers.1", "stages.1.layers.1"), "convnext": ("stages.0.layers.1", "stages.1.layers.1")}
BESIDE = {"bert": 1, "clip": 1, "llava": 5 * 6 + 2 * 6 + 2, "convnext": 1, "resnet": 2}
"""Conventional layers that are no block's: BERT's pooler, CLIP's projection of pictures, LLaVA's vision tower and
projector, ConvNeXt's reduction between stages, ResNet's two shortcuts."""
_SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("depth", "num_blocks", "blocks"),
    [
        # the table of the reference implementation, from 0
        (16, 2, [7, 15]),
        (24, 4, [5, 11, 17, 23]),
        (28, 8, [2, 5, 8, 11, 14, 17, 20, 27]),
        (36, 4, [8, 17, 26, 35]),
        (3, 1, [2]),
    ],
)
def test_blocks_are_those_of_the_reference(depth, num_blocks, blocks):
    assert last_blocks(depth, num_blocks) == blocks


@pytest.mark.parametrize("num_blocks", [-1, 5])
def test_more_parts_than_blocks_are_refused(num_blocks):
    with pytest.raises(ValueError, match=rf"between 1 and the number of blocks of the model, 4, but is {num_blocks}"):
        place(mlp(), num_blocks=num_blocks)


def test_without_parts_every_layer_is_conventional():
    with_two, none = place(mlp(), num_blocks=2), place(mlp(), num_blocks=0)

    assert none.layers.keys() == with_two.layers.keys()
    assert any(with_two.layers.values())
    assert not any(none.layers.values())
    with pytest.raises(ValueError, match="no layer would be adapted"):
        place(mlp(), num_blocks=0, private_layers=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_meets_in_the_same_blocks_by_role(family):
    """Five blocks in two parts: blocks 1 and 4 of each tower, with each role once, and the head left out."""
    found = place(FAMILIES[family](depth=5), num_blocks=2, blocks=BLOCKS.get(family))

    colora = {name: address for name, address in found.layers.items() if address is not None}
    assert {(a.tower, a.block, a.role) for a in colora.values()} == {
        (tower, b, r) for b in (0, 1) for tower, roles in ROLES[family].items() for r in roles
    }
    blocks = STAGED.get(family, (".1.", ".4."))
    assert {block for block in blocks if any(block in name for name in colora)} == set(blocks)
    assert all(any(block in name for block in blocks) for name in colora)
    assert HEADS.get(family, "lm_head") in found.skipped
    assert not found.own_words
    inside = [name for name, address in found.layers.items() if address is None]
    assert len(inside) == 3 * sum(map(len, ROLES[family].values())) + BESIDE.get(family, 0)


def test_of_convolutions_the_report_says_which_hold_no_adapter_and_why():
    found = place(FAMILIES["convnext"](), num_blocks=2)

    reasons = {name: reason.split(":")[0] for name, reason in found.skipped.items()}
    assert reasons["convnext.encoder.stages.0.layers.0.dwconv"] == "a convolution in groups of channels"
    assert "a stem or patches" in reasons["convnext.embeddings.patch_embeddings"]
    assert len(reasons) == 4 + 1 + 1  # a depthwise one in each block, the patches, the head
    named = place(FAMILIES["convnext"](), num_blocks=2, target_modules=["pwconv1", "pwconv2", "patch_embeddings"])
    assert "convnext.embeddings.patch_embeddings" in named.layers


def test_convolutions_narrower_than_the_rank_are_left_out_unless_they_are_named():
    """A network of convolutions is narrow in parts by design; a transformer is not, and there it is an error."""
    model = FAMILIES["efficientnet"]()
    whole, narrow = place(model, num_blocks=2, min_width=4), place(model, num_blocks=2, min_width=16)

    assert "efficientnet.encoder.blocks.1.squeeze_excite.reduce" in whole.layers
    assert {a.role for a in narrow.layers.values() if a} == {"expand", "project"}
    assert narrow.skipped["efficientnet.encoder.blocks.1.squeeze_excite.reduce"].endswith("than the rank, 16")
    assert place(model, num_blocks=2, target_modules=["reduce"], min_width=16).layers


class Stage(nn.Module):
    """As timm builds them: blocks in a Sequential, and a change of width before."""

    def __init__(self, inputs, width, depth):
        super().__init__()
        self.downsample = nn.Conv2d(inputs, width, 2, stride=2)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(depth)))


class Residual(nn.Module):
    def __init__(self, width, inputs=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs or width, width, 1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1)) if inputs else None


def test_stages_of_other_widths_are_one_stack_of_their_blocks():
    """A tree like timm's: five blocks in two stages, of which those at 1 and 4 are shared."""
    model = nn.Module()
    model.stem, model.stages = nn.Conv2d(3, 8, 4), nn.Sequential(Stage(8, 8, 3), Stage(8, 16, 2))
    model.head = nn.Linear(16, 2)

    found = place(model, num_blocks=2)

    assert found.stacks == {"main": "stages.*.blocks"}
    shared = {str(address): name for name, address in found.layers.items() if address}
    assert shared == {
        "main/0/conv1": "stages.0.blocks.1.conv1", "main/0/conv2": "stages.0.blocks.1.conv2",
        "main/1/conv1": "stages.1.blocks.1.conv1", "main/1/conv2": "stages.1.blocks.1.conv2",
    }  # fmt: skip
    assert set(found.skipped) == {"stem", "head"}
    assert place(model, num_blocks=2, blocks="stages.*.blocks").layers == found.layers


def test_stages_that_stand_side_by_side_under_numbered_names_are_one_stack():
    """A tree like torchvision's ResNet: layer1, layer2, each a Sequential; a shortcut where the width changes."""

    def model(second):
        tree = nn.Module()
        tree.conv1 = nn.Conv2d(3, 8, 4)
        tree.layer1 = nn.Sequential(Residual(8), Residual(8))
        tree.layer2 = nn.Sequential(Residual(second, 8), Residual(second), Residual(second))
        tree.fc = nn.Linear(second, 2)
        return tree

    found = place(nn.ModuleDict({"net": model(16)}), num_blocks=2)

    assert found.stacks == {"main": "net.layer*"}
    shared = {str(address): name for name, address in found.layers.items() if address}
    assert shared["main/0/conv1"] == "net.layer1.1.conv1"
    assert shared["main/1/conv2"] == "net.layer2.2.conv2"
    deep = place(nn.ModuleDict({"net": model(16)}), num_blocks=5)
    assert {str(a) for a in deep.layers.values() if a and a.role == "shortcut"} == {"main/2/shortcut"}
    assert deep.stacks == place(nn.ModuleDict({"net": model(16)}), num_blocks=5, blocks="layer*").stacks


def test_blocks_that_are_alike_are_no_stages_whatever_they_hold():
    """Experts of one width in every block; and two towers of one width side by side."""

    def block():
        experts = (nn.ModuleDict({"w1": nn.Linear(4, 8), "w2": nn.Linear(8, 4)}) for _ in range(3))
        return nn.ModuleDict({"experts": nn.ModuleList(experts)})

    model = nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(2)), "head": nn.Linear(4, 2)})
    towers = nn.ModuleDict({f"tower{i}": nn.ModuleList(Residual(8) for _ in range(3)) for i in (1, 2)})

    assert place(copy.deepcopy(model), num_blocks=1).stacks == {"main": "layers"}
    with pytest.raises(
        ValueError, match=r"several stacks of blocks with 6 adapted layers each: \['tower1', 'tower2'\]"
    ):
        place(towers, num_blocks=1)


def test_a_pattern_names_blocks_in_a_tree_of_the_users_own():
    """DenseNet's blocks are neither in a ModuleList nor in a Sequential of one kind."""
    block = {f"layer{i}": nn.ModuleDict({"conv1": nn.Conv2d(8, 8, 1), "conv2": nn.Conv2d(8, 8, 3)}) for i in range(2)}
    parts = {f"{kind}{i}": nn.ModuleDict(copy.deepcopy(block)) for i in range(2) for kind in ("dense", "other")}
    model = nn.ModuleDict({"features": nn.ModuleDict(parts), "head": nn.Linear(8, 2)})

    found = place(model, num_blocks=4, blocks="features.dense*")

    shared = [name for name, address in found.layers.items() if address and address.role == "conv2"]
    assert shared == [f"features.dense{i}.layer{j}.conv2" for i in range(2) for j in range(2)]
    with pytest.raises(ValueError, match=r"`\*.layer0` fits \['a.features.\*.layer0', 'b.features"):
        place(nn.ModuleDict({"a": model, "b": copy.deepcopy(model)}), num_blocks=1, blocks="*.layer0")


def test_a_role_that_no_map_names_is_told():
    block = {"mix": nn.Linear(4, 4), "fc1": nn.Linear(4, 4)}
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict(copy.deepcopy(block)) for _ in range(2))})
    model["head"] = nn.Linear(4, 2)

    assert place(model, num_blocks=1).own_words == ("layers.1.mix",)
    assert place(model, num_blocks=1, roles={"mix": "fc2"}).own_words == ()


def test_a_plain_mlp_is_a_stack_of_its_linear_layers_without_the_last():
    found = place(mlp(), num_blocks=2)

    assert {name: str(address) for name, address in found.layers.items()} == {
        "0": "None", "2": "main/0/linear", "4": "None", "6": "main/1/linear",
    }  # fmt: skip
    assert list(found.skipped) == ["8"]


def test_a_model_without_a_head_keeps_its_last_linear_layer():
    inner = llama().model
    assert isinstance(inner, LlamaModel)

    assert "layers.3.mlp.down_proj" in place(inner, num_blocks=2).layers


def test_wherever_a_model_stands_its_addresses_are_the_same():
    wrapped = nn.ModuleDict({"net": llama(), "head": nn.Linear(16, 2)})

    alone, inside = place(llama(), num_blocks=2), place(wrapped, num_blocks=2)

    assert {f"net.{name}": address for name, address in alone.layers.items()} == dict(inside.layers)
    assert {"net.lm_head", "head"} <= set(inside.skipped)


def test_a_pipeline_is_no_stack():
    """Sequential(backbone, projector) is walked through; the backbone's blocks count."""
    pipeline = nn.Sequential(llama().model, nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))

    assert place(pipeline, num_blocks=4).stacks == {"main": "0.layers"}
    with_head = nn.Sequential(llama().model, nn.Linear(16, 2))  # one element holds every adapted layer
    assert place(with_head, num_blocks=4).stacks == {"main": "0.layers"}


def test_of_nested_stacks_the_outermost_counts():
    block = nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)})
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"parts": nn.ModuleList([block])})])})

    assert place(model, num_blocks=1).stacks == {"main": "layers"}


def test_without_any_stack_the_model_is_one_block():
    model = nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4), "head": nn.Linear(4, 2)})

    found = place(model, num_blocks=1)

    assert {name: str(a) for name, a in found.layers.items()} == {"fc1": "main/0/fc1", "fc2": "main/0/fc2"}
    with pytest.raises(ValueError, match="number of blocks of the model, 1, but is 2"):
        place(model, num_blocks=2)


def test_in_a_llava_the_language_model_wins_over_the_longer_vision_tower():
    """Six blocks of six layers see, four of seven write."""
    model = llava()

    found = place(model, num_blocks=2)
    both = place(model, num_blocks=2, blocks={"text": "language_model.layers", "image": "encoder.layers"})

    assert found.stacks["main"].endswith("language_model.layers")
    assert {a.tower for a in both.layers.values() if a} == {"text", "image"}
    without = place(model, num_blocks=2, exclude_modules=["vision_tower", "multi_modal_projector"])
    assert not any("vision" in name or "projector" in name for name in without.layers)
    apart = nn.ModuleDict({"eye": model.model.vision_tower, "writer": llama(depth=2)})
    assert place(apart, num_blocks=2).stacks == {"main": "writer.model.layers"}


def test_two_equal_towers_are_an_error_that_asks_for_blocks():
    tower = {"num_hidden_layers": 2, **_SMALL}
    config = CLIPConfig(
        text_config={"vocab_size": 32, **tower}, vision_config={"image_size": 8, "patch_size": 4, **tower}
    )

    with pytest.raises(ValueError, match=r"several stacks of blocks with 12 adapted layers each: .*blocks='text_model"):
        place(CLIPModel(config), num_blocks=2)


def test_a_decoders_two_attentions_do_not_collide():
    config = BartConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=32,
    )  # fmt: skip

    found = place(BartForConditionalGeneration(config), num_blocks=1)

    roles = [a.role for a in found.layers.values() if a]
    assert found.stacks == {"main": "model.decoder.layers"}
    assert sorted(roles) == sorted(PLAIN | CROSS)


def test_experts_of_one_block_get_addresses_of_their_own_and_the_log_says_so(caplog):
    def block():
        experts = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(4, 4)}) for _ in range(3))
        return nn.ModuleDict({"q_proj": nn.Linear(4, 4), "experts": experts})

    model = nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(2))})

    with caplog.at_level(logging.WARNING, "lightning_pfl.adapters.placement"):
        found = place(model, num_blocks=1)

    roles = {a.role for a in found.layers.values() if a}
    assert roles == {"q", "experts.0.up_proj", "experts.1.up_proj", "experts.2.up_proj"}
    assert caplog.text.count("Role `up` occurs 3 times in block `layers.1`") == 1
    named = {f"experts.{i}.up_proj": f"expert{i}" for i in range(3)}
    assert {a.role for a in place(model, num_blocks=1, roles=named).layers.values() if a} == {"q", *named.values()}


def test_no_match_says_what_was_there():
    with pytest.raises(ValueError, match=r"with target_modules=\['q'\].*\['0', '2', '4', '6', '8'\]"):
        place(mlp(), num_blocks=1, target_modules=["q"])


def test_a_named_head_is_adapted_and_a_wrong_stack_is_refused():
    assert "8" in place(mlp(), num_blocks=1, target_modules=["6", "8"]).layers
    with pytest.raises(ValueError, match=r"`encoder` fits none. Stacks that were there: \['model.layers'\]"):
        place(llama(), num_blocks=1, blocks="encoder")


def test_private_layers_can_be_left_out():
    found = place(llama(), num_blocks=2, private_layers=False)

    assert all(found.layers.values())
    assert len(found.layers) == 14
    assert found.skipped["model.layers.0.mlp.up_proj"].startswith("outside the shared blocks")


def test_torch_attention_is_left_alone_because_it_never_calls_its_projection():
    layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers), "head": nn.Linear(8, 2)})

    found = place(model, num_blocks=1)

    assert {a.role for a in found.layers.values() if a} == {"fc1", "fc2"}
    assert "MultiheadAttention" in found.skipped["layers.0.self_attn.out_proj"]


def test_a_layer_that_stands_in_several_places_is_left_alone():
    """Replacing it would reach one of the places only, and the other would silently go without adapter."""
    shared = nn.Linear(4, 4)
    layers = [nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": shared}) for _ in range(2)]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers), "head": nn.Linear(4, 2)})

    found = place(model, num_blocks=1)

    assert "fc2" not in {a.role for a in found.layers.values() if a}
    assert found.skipped["layers.0.fc2"].startswith("it stands in several places")
    reused = nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)})] * 3)
    assert len(place(reused, num_blocks=1).layers) == 2, "a block that is used again is adapted once, for all its uses"


def test_placement_leaves_the_model_as_it_was():
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    place(model, num_blocks=2)

    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
