"""Promises of `lightning_pfl.adapters.placement`, on every family that the project names."""

from __future__ import annotations

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
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from lightning_pfl.adapters.placement import last_blocks, place
from tests.adapters.tiny import FAMILIES, llama, mlp

GATED = {"q", "k", "v", "o", "gate", "up", "down"}
PLAIN = {"q", "k", "v", "o", "fc1", "fc2"}
ROLES = {
    "llama": GATED, "gemma3": GATED, "qwen2": GATED, "opt": PLAIN, "bert": PLAIN, "vit": PLAIN,
    "gpt2": {"qkv", "o", "fc1", "fc2"},
}  # fmt: skip
HEADS = {"bert": "classifier", "vit": "classifier"}
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


@pytest.mark.parametrize("num_blocks", [0, 5])
def test_more_parts_than_blocks_are_refused(num_blocks):
    with pytest.raises(ValueError, match=rf"between 1 and the number of blocks of the model, 4, but is {num_blocks}"):
        place(mlp(), num_blocks=num_blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_meets_in_the_same_blocks_by_role(family):
    """Five blocks in two parts: blocks 1 and 4, with each role once, and the head left out."""
    found = place(FAMILIES[family](depth=5), num_blocks=2)

    colora = {name: address for name, address in found.layers.items() if address is not None}
    assert {(a.tower, a.block, a.role) for a in colora.values()} == {
        ("main", b, r) for b in (0, 1) for r in ROLES[family]
    }
    assert {f".{i}." for i in range(5) if any(f".{i}." in name for name in colora)} == {".1.", ".4."}
    assert HEADS.get(family, "lm_head") in found.skipped
    inside = [name for name, address in found.layers.items() if address is None]
    assert len(inside) == 3 * len(ROLES[family]) + ("bert" in family)  # BERT's pooler stands outside the blocks


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
    tower = {"num_hidden_layers": 6, **_SMALL}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **tower},
        text_config={"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 32, **tower},
    )
    model = LlavaForConditionalGeneration(config)

    found = place(model, num_blocks=2)
    both = place(model, num_blocks=2, blocks={"text": "language_model.layers", "image": "encoder.layers"})

    assert found.stacks["main"].endswith("language_model.layers")
    assert {a.tower for a in both.layers.values() if a} == {"text", "image"}
    without = place(model, num_blocks=2, exclude_modules=["vision_tower", "multi_modal_projector"])
    assert not any("vision" in name or "projector" in name for name in without.layers)


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
    assert sorted(roles) == sorted(PLAIN | {"cross_q", "cross_k", "cross_v", "cross_o"})


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
