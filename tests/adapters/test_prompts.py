"""Promises of `lightning_pfl.adapters.prompts`: what a gate may read of a sequence, and what it remembers."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin

from lightning_pfl.adapters import CoLoraConfig, InputGate, add_global_branch, inject, prompt_positions
from lightning_pfl.adapters.layer import CoLoraLayer, CoLoraLinear
from tests.adapters.tiny import (
    BLOCKS,
    CAUSAL,
    ENCODER_DECODERS,
    FAMILIES,
    bert,
    inputs,
    llama,
    llava,
    mlp,
    opt,
    scramble,
    t5,
    vit,
)

GATED = CoLoraConfig(r=4, alpha=8, num_blocks=2, gate=InputGate(), global_branch=True)
IDS = torch.randint(1, 32, (3, 6), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[0, :2] = 0  # left padding, as in batched generation


def gated(model):
    family = type(model).__name__.partition("For")[0].removesuffix("Model").lower()
    inject(model, replace(GATED, blocks=BLOCKS.get(family)))
    scramble(model, scale=0.5)
    return model


@pytest.fixture
def openings(monkeypatch):
    """What every call of a gated layer sees: (layer, opening)."""
    from lightning_pfl.adapters.prompts import PromptContext

    seen: list[tuple[CoLoraLinear, torch.Tensor]] = []
    original = PromptContext.beta

    def beta(self, layer, adapter_name, x, parameter):
        found = original(self, layer, adapter_name, x, parameter)
        seen.append((layer, found.detach().clone()))
        return found

    monkeypatch.setattr(PromptContext, "beta", beta)
    return seen


def logits(model, **batch):
    with torch.no_grad():
        return model(**batch).logits


def first_inputs(model, **batch):
    """The input of the first gated layer, [batch, length, d_in]."""
    kept: list[torch.Tensor] = []
    layer = next(m for m in model.modules() if isinstance(m, CoLoraLinear))
    handle = layer.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach()))
    logits(model, **batch)
    handle.remove()
    return layer, kept[0]


def test_with_labels_a_causal_model_reads_the_unmasked_positions_before_the_first_label(openings):
    model, labels = gated(llama()), IDS.clone()
    labels[0, :4], labels[1, :1], labels[2, :5] = -100, -100, -100
    batch = {"input_ids": IDS, "attention_mask": PADDED, "labels": labels}

    layer, x = first_inputs(model, **batch)

    # by hand: row 0 is padded in 0-1 and answers from 4 on; row 1 answers from 1 on; row 2 from 5 on
    summary = torch.stack([x[0, 2:4].mean(0), x[1, 0], x[2, :5].mean(0)])
    expected = (summary @ layer.colora_gate["default"]).sigmoid()
    torch.testing.assert_close(openings[0][1], expected)


@pytest.mark.parametrize("labels", [None, IDS], ids=["no labels", "labels from the start"])
def test_without_a_prompt_a_causal_model_reads_its_first_token_only(openings, labels):
    model = gated(llama())

    layer, x = first_inputs(model, input_ids=IDS, attention_mask=PADDED, labels=labels)

    summary = torch.stack([x[0, 2], x[1, 0], x[2, 0]])  # of row 0, 0 and 1 are padding
    torch.testing.assert_close(openings[0][1], (summary @ layer.colora_gate["default"]).sigmoid())


@pytest.mark.parametrize("family", CAUSAL)
def test_no_position_learns_of_later_ones(family):
    """Changing the last token changes no earlier logit, with labels and without."""
    model, changed = gated(FAMILIES[family]()), IDS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 32
    labels = IDS.clone()
    labels[:, :3] = -100
    for extra in ({}, {"labels": labels}):
        before, after = logits(model, input_ids=IDS, **extra), logits(model, input_ids=changed, **extra)
        assert torch.equal(before[:, :-1], after[:, :-1])
        assert not torch.allclose(before[:, -1], after[:, -1])


def test_a_pooled_gate_would_have_leaked():
    """The test above can fail: told to read everything, the same model's earlier logits do change."""
    model, changed = gated(llama()), IDS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 32
    with prompt_positions(model, torch.ones_like(IDS)):
        assert not torch.allclose(logits(model, input_ids=IDS)[:, :-1], logits(model, input_ids=changed)[:, :-1])


def test_an_encoder_reads_every_unmasked_position():
    """Padding on the right changes nothing for a BERT, whatever the padding holds."""
    model, mask = gated(bert()), torch.ones_like(IDS)
    mask[:, 4:] = 0

    padded = logits(model, input_ids=IDS, attention_mask=mask)

    torch.testing.assert_close(padded, logits(model, input_ids=IDS[:, :4]), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(padded, logits(model, input_ids=IDS), atol=1e-4)


def test_images_are_read_as_a_whole(openings):
    model = gated(vit())

    layer, x = first_inputs(model, pixel_values=torch.randn(2, 3, 16, 16))

    assert x.dim() == 3
    torch.testing.assert_close(openings[0][1], (x.mean(1) @ layer.colora_gate["default"]).sigmoid())
    conv_like = torch.randn(2, 4, 5, 8)  # [batch, height, width, channels]
    net = gated(mlp())
    net(conv_like)
    torch.testing.assert_close(
        openings[len(openings) - 4][1], (conv_like.mean((1, 2)) @ net[0].colora_gate["default"]).sigmoid()
    )


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("more", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_while_decoding_every_layer_keeps_the_opening_that_it_had_for_the_prompt(openings, family, more):
    model = gated(FAMILIES[family]())

    model.generate(IDS, attention_mask=PADDED, max_new_tokens=4, do_sample=False, **more)

    layers = [m for m in model.modules() if isinstance(m, CoLoraLinear)]
    passes = [openings[i : i + len(layers)] for i in range(0, len(openings), len(layers))]
    assert len(passes) == 4
    for later in passes[1:]:
        for (layer, prompt), (same, opening) in zip(passes[0], later, strict=True):
            assert layer is same
            per_sample = prompt.reshape(IDS.shape[0] * more.get("num_beams", 1), -1)[:, 0]
            # beams of one prompt may differ in the last bit, and are reordered
            torch.testing.assert_close(opening, per_sample, atol=1e-6 if more else 0, rtol=0)
    first = passes[0][0][1].reshape(IDS.shape[0], -1)[:, 0]
    assert len(set(first.tolist())) == 3, "every sample has an opening of its own"


@pytest.mark.parametrize("act", ["reorder", "select", "repeat", "copy"])
def test_openings_follow_the_rows_of_the_cache(act):
    """Decoding after the rows were moved gives the moved rows' logits, as if nothing was moved."""
    model, cache, step = gated(llama()), DynamicCache(), torch.tensor([[5], [6], [7]])
    logits(model, input_ids=IDS, past_key_values=cache)
    rows = {"reorder": [2, 0, 1], "select": [2, 0], "repeat": [0, 0, 1, 1, 2, 2], "copy": [2, 0, 1]}[act]
    plain = copy.deepcopy(cache)
    expected = logits(model, input_ids=step, past_key_values=plain)[rows]

    if act == "repeat":
        cache.batch_repeat_interleave(2)
    elif act == "select":
        cache.batch_select_indices(torch.tensor(rows))
    else:
        moved = copy.deepcopy(cache) if act == "copy" else cache
        moved.reorder_cache(torch.tensor(rows))
        if act == "copy":  # moving the copy left the original where it was
            assert torch.equal(logits(model, input_ids=step, past_key_values=copy.deepcopy(cache))[rows], expected)
            cache = moved

    torch.testing.assert_close(logits(model, input_ids=step[rows], past_key_values=cache), expected)


def test_a_cache_that_the_model_made_itself_goes_on_with_the_openings_of_its_first_pass():
    model = gated(llama())
    with torch.no_grad():
        first = model(input_ids=IDS[:, :4], use_cache=True)
        second = model(input_ids=IDS[:, 4:5], past_key_values=first.past_key_values)

    assert torch.equal(second.logits.argmax(-1), logits(model, input_ids=IDS)[:, 4:5].argmax(-1))


def test_a_prompt_in_pieces_is_refused():
    model = gated(llama())
    with pytest.raises(ValueError, match=r"needs it in one piece, but 3 more positions came"):
        model.generate(IDS, max_new_tokens=2, prefill_chunk_size=3)


def test_a_cache_filled_without_the_adapters_is_refused():
    model, cache = llama(), DynamicCache()
    logits(model, input_ids=IDS, past_key_values=cache)
    with pytest.raises(ValueError, match="filled without these adapters"):
        logits(gated(model), input_ids=IDS[:, :1], past_key_values=cache)


def test_a_model_that_flattens_its_batch_is_read_by_sample(openings):
    """OPT hands [batch * length, d] to its feed-forward layers in some releases; either way rows belong to samples."""
    model = gated(opt())
    layer = next(m for n, m in model.named_modules() if n.endswith("fc1"))
    x = torch.randn(3, 6, 16)
    context = layer.colora_context
    context.begin(model, (), {"input_ids": IDS, "attention_mask": PADDED, "past_key_values": DynamicCache()})

    flat, whole = layer(x.flatten(0, 1)), layer(x)

    context.end(None)
    torch.testing.assert_close(flat, whole.flatten(0, 1))
    assert openings[0][1].shape == (18,)


def test_recomputed_activations_read_the_prompt_of_their_own_pass():
    """An evaluation pass between forward and backward must not change what is recomputed."""

    def gradients(checkpoint, in_between):
        model = gated(llama()).train()
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        labels = IDS.clone()
        labels[:, :3] = -100
        loss = model(input_ids=IDS, labels=labels, use_cache=False).loss
        if in_between:
            logits(model, input_ids=IDS[:, :2], use_cache=False)
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "embed" not in n}

    expected = gradients(False, False)
    for name, grad in gradients(True, True).items():
        torch.testing.assert_close(grad, expected[name])


def test_two_prompts_before_one_backward_are_refused_when_activations_are_recomputed():
    model = gated(llama()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    labels = IDS.clone()
    labels[:, :3] = -100

    def loss(start):
        shifted = IDS.clone()
        shifted[:, :start] = -100
        return model(input_ids=IDS, labels=shifted, use_cache=False).loss

    (loss(3) + loss(3)).backward()  # the same prompt positions: nothing to mix up
    with pytest.raises(ValueError, match=r"must not be called twice, with different prompts, before the backward"):
        (loss(3) + loss(4)).backward()
    loss(2).backward()  # and the next step works


def test_positions_can_be_named_and_must_fit():
    model, mask = gated(llama()), torch.zeros_like(IDS, dtype=torch.bool)
    mask[:, 1:3] = True
    plain = logits(model, input_ids=IDS)

    with prompt_positions(model, mask):
        assert not torch.allclose(logits(model, input_ids=IDS), plain)
    assert torch.equal(logits(model, input_ids=IDS), plain)
    with prompt_positions(model, mask[:, :4]), pytest.raises(ValueError, match=r"mask of shape \(3, 4\).* \(3, 6\)"):
        logits(model, input_ids=IDS)
    with pytest.raises(ValueError, match="at least one True in every row"), prompt_positions(model, ~mask & mask):
        pass
    assert torch.equal(logits(model, input_ids=IDS), plain), "an error inside a pass leaves no trace"


def test_positions_can_be_named_for_a_module_that_is_no_transformers_model(openings):
    net, x = gated(mlp()), torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False, False], [True, True, False]])

    with prompt_positions(net, mask):
        net(x)

    summary = torch.stack([x[0, 0], x[1, :2].mean(0)])
    torch.testing.assert_close(openings[0][1], (summary @ net[0].colora_gate["default"]).sigmoid())


def test_the_pass_of_the_outer_model_lasts_until_the_outer_model_returns(openings):
    """An adapted head runs after the backbone has returned, and still reads the prompt."""
    model = llama()
    targets = ["q_proj", "lm_head"]
    inject(model, CoLoraConfig(r=4, num_blocks=2, target_modules=targets, gate=InputGate(), global_branch=True))
    scramble(model)
    labels = IDS.clone()
    labels[:, :3] = -100

    with torch.no_grad():
        hidden = model(input_ids=IDS, labels=labels, output_hidden_states=True).hidden_states[-1]

    layer, opening = openings[-1]
    assert layer is model.lm_head
    torch.testing.assert_close(opening, (hidden[:, :3].mean(1) @ layer.colora_gate["default"]).sigmoid())


def test_a_pass_that_fails_leaves_no_trace():
    model, labels = gated(llama()), IDS.clone()
    labels[:, :3] = -100
    expected = logits(model, input_ids=IDS, labels=labels)
    with pytest.raises(IndexError):  # no such token: fails inside the model
        logits(model, input_ids=IDS + 1000)

    assert torch.equal(logits(model, input_ids=IDS, labels=labels), expected)


def test_a_copy_of_a_model_knows_nothing_of_the_passes_of_the_first():
    model = gated(llama())
    model(input_ids=IDS)
    assert model.colora_context._trained is not None

    twin = pickle.loads(pickle.dumps(model))

    assert twin.colora_context._trained is None
    assert twin.colora_context.is_causal
    layers = [m for m in twin.modules() if isinstance(m, CoLoraLinear)]
    assert all(layer.colora_context is twin.colora_context for layer in layers)


def test_a_mask_that_is_not_one_per_position_is_refused():
    with pytest.raises(ValueError, match=r"attention mask of shape \(3, 6\), but it came of shape \(3, 1, 6, 6"):
        logits(gated(llama()), input_ids=IDS, attention_mask=torch.ones(3, 1, 6, 6, dtype=torch.bool))


def told(model, openings, **batch):
    """Per adapted layer, its name, its input and its opening in one pass."""
    names = {layer: name for name, layer in model.named_modules() if isinstance(layer, CoLoraLayer)}
    kept = {}
    handles = [
        layer.register_forward_pre_hook(lambda layer, args: kept.setdefault(layer, args[0].detach())) for layer in names
    ]
    openings.clear()
    logits(model, **batch)
    for handle in handles:
        handle.remove()
    return [(names[layer], layer, kept[layer], opening) for layer, opening in openings]


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_encoder_reads_its_prompt_and_a_decoder_its_first_position(openings, family):
    """Keys and values of cross-attention are given the encoder's output, and read that."""
    model, batch = gated(ENCODER_DECODERS[family]()), inputs(ENCODER_DECODERS[family]())
    unmasked = 8
    if family == "t5":
        batch["attention_mask"] = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
        batch["decoder_input_ids"] = torch.cat([batch["decoder_input_ids"]] * 2, dim=1)[:, :6]  # of one length with it
        unmasked = batch["attention_mask"].bool()

    seen = told(model, openings, **batch)

    assert len(seen) == len({name for name, *_ in seen})
    kinds = set()
    for name, layer, x, opening in seen:
        of_encoder = name.removeprefix("model.").startswith("encoder.") or _is_cross_key_or_value(name)
        kinds.add(of_encoder)
        if not of_encoder:
            summary = x[:, 0]
        elif family == "t5":
            summary = torch.stack([row[mask].mean(0) for row, mask in zip(x, unmasked, strict=True)])
        else:
            assert x.shape[1] == unmasked
            summary = x.mean(1)
        torch.testing.assert_close(opening, (summary @ layer.colora_gate["default"]).sigmoid())
    assert kinds == {True, False}


def _is_cross_key_or_value(name):
    is_cross = "EncDecAttention" in name or "encoder_attn" in name
    return is_cross and name.rpartition(".")[2].removesuffix("_proj") in ("k", "v")


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_no_position_of_a_decoder_learns_of_later_ones(family):
    model, batch = gated(ENCODER_DECODERS[family]()), inputs(ENCODER_DECODERS[family]())
    before = logits(model, **batch)
    changed = batch["decoder_input_ids"].clone()
    changed[:, -1] = (changed[:, -1] + 1) % 32
    batch["decoder_input_ids"] = changed

    after = logits(model, **batch)

    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])


def test_labels_and_the_tokens_that_they_stand_for_give_a_decoder_the_same_openings():
    """T5 makes its decoder's input from labels; the last layer sees the same either way."""
    model, batch = gated(t5()), inputs(t5())
    tokens = batch.pop("decoder_input_ids").contiguous()
    shifted = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1)

    assert torch.equal(logits(model, **batch, labels=tokens), logits(model, **batch, decoder_input_ids=shifted))


def test_named_positions_of_an_encoder_decoder_model_are_the_encoders():
    model, batch = gated(t5()), inputs(t5())
    plain, mask = logits(model, **batch), torch.ones(2, 6, dtype=torch.bool)

    with prompt_positions(model, mask):
        assert torch.equal(logits(model, **batch), plain)
    mask[:, 3:] = False
    with prompt_positions(model, mask):
        assert not torch.allclose(logits(model, **batch), plain)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_beams_of_a_decoder_keep_the_openings_of_their_prompts(openings, family):
    model = gated(ENCODER_DECODERS[family]())
    given = inputs(model)
    given["decoder_input_ids"] = given["decoder_input_ids"][:, :2]

    GenerationMixin.generate(model, **given, max_new_tokens=4, do_sample=False, num_beams=3)

    names = {m: n for n, m in model.named_modules()}
    decoding = [
        (m, o.reshape(-1)) for m, o in openings if "decoder" in names[m] and not _is_cross_key_or_value(names[m])
    ]
    first = {}
    for m, opening in decoding:
        if m in first:  # the same two prompts' openings; beams of one prompt never leave it
            torch.testing.assert_close(opening, first[m], atol=1e-6, rtol=0)
        first.setdefault(m, opening)
    assert len(decoding) == 4 * len(first)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_recomputed_activations_of_both_sequences_read_their_own_pass(family):
    def gradients(checkpoint):
        model = gated(ENCODER_DECODERS[family]()).train()
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.config.dropout = model.config.dropout_rate = 0.0
        batch = inputs(model)
        model(**batch, use_cache=False).logits.square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "embed" not in n}

    expected, found = gradients(False), gradients(True)

    assert {n for n in expected if "gate" in n} <= set(found)
    for name, grad in expected.items():
        if "shared" not in name:
            torch.testing.assert_close(found[name], grad)


def test_a_head_behind_a_decoder_reads_what_the_decoder_reads(openings):
    model, batch = t5(), inputs(t5())
    config = CoLoraConfig(
        r=4,
        num_blocks=2,
        target_modules=["wo", "lm_head"],
        blocks="decoder.block",
        gate=InputGate(),
        global_branch=True,
    )
    inject(model, config)
    scramble(model)

    seen = {name: (layer, x, opening) for name, layer, x, opening in told(model, openings, **batch)}

    layer, x, opening = seen["lm_head"]
    torch.testing.assert_close(opening, (x[:, 0] @ layer.colora_gate["default"]).sigmoid())


def test_what_joins_two_towers_reads_all_that_it_is_given(openings):
    """LLaVA's projector is given patches, not the text's positions."""
    model, batch = gated(llava()), inputs(llava())

    seen = {name: (layer, x, opening) for name, layer, x, opening in told(model, openings, **batch)}

    layer, x, opening = seen["model.multi_modal_projector.linear_1"]
    torch.testing.assert_close(opening, (x.flatten(1, -2).mean(1) @ layer.colora_gate["default"]).sigmoid())
    text, x, opening = seen["model.language_model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(opening, (x[:, 0] @ text.colora_gate["default"]).sigmoid())
    eye, x, opening = seen["model.vision_tower.encoder.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(opening, (x.mean(1) @ eye.colora_gate["default"]).sigmoid())


def test_a_model_inside_a_larger_module_is_told_of_its_own_calls(openings):
    """The outer module calls the inner model's backbone itself, as a LightningModule may."""
    outer = nn.ModuleDict({"net": llama(), "head": nn.Linear(16, 2)})
    inject(outer, CoLoraConfig(r=4, alpha=8, num_blocks=2, gate=InputGate()))
    add_global_branch(outer)
    scramble(outer)

    with torch.no_grad():
        through_head = outer["net"](input_ids=IDS, output_hidden_states=True).hidden_states[-1]
        count = len(openings)
        direct = outer["net"].model(input_ids=IDS).last_hidden_state

    assert torch.equal(direct, through_head)
    assert count == len(openings) - count == 28
