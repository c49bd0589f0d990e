"""What PEFT and transformers do with every tuner must work with ours, for every gate and family; and every gate policy
keeps the promises of `GatePolicy`.
"""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn
from transformers import GenerationMixin

from lightning_pfl.adapters import Additive, CoLoraConfig, CoLoraLayer, GatePolicy, InputGate, StaticGate
from tests.adapters.tiny import BLOCKS, CAUSAL, ENCODER_DECODERS, FAMILIES, inputs, llama, mlp, output, scramble

POLICIES = [StaticGate(), StaticGate(Additive()), InputGate(), InputGate(Additive())]
ALL = {**FAMILIES, "mlp": mlp}

every_family = pytest.mark.parametrize("family", ALL)
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=str)
every_config = pytest.mark.parametrize(
    "settings", [{}, *({"global_branch": True, "gate": policy} for policy in POLICIES)],
    ids=["alone", *map(str, POLICIES)],
)  # fmt: skip
_GATED = {"global_branch": True, "gate": InputGate()}
CASES = [
    *((family, _GATED) for family in ALL),
    ("llama", {}),
    *(("gpt2", {"global_branch": True, "gate": policy}) for policy in POLICIES),
]
every_family_and_every_config = pytest.mark.parametrize(("family", "settings"), CASES, ids=str)


def config(**settings) -> CoLoraConfig:
    return CoLoraConfig(**{"r": 4, "alpha": 8, "num_blocks": 2, **settings})


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@every_policy
def test_a_policy_starts_at_zero_stays_within_bounds_and_survives_json(policy):
    parameter = torch.zeros(policy.parameter_shape(3), requires_grad=True)
    summary = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)) if policy.reads_input else None

    beta = policy.beta(parameter, summary)

    assert beta.shape == ((2,) if policy.reads_input else ())
    assert torch.equal(beta, torch.full_like(beta, 0.5))
    beta.sum().backward()
    assert parameter.grad.abs().max() > 0
    for value in (-100.0, 3.0):
        opening = policy.beta(torch.full_like(parameter, value), summary)
        assert ((opening >= 0) & (opening <= 1)).all()
        assert all(weight.shape == beta.shape for weight in policy.combine.weights(opening))
    assert GatePolicy.from_dict(policy.to_dict()) == policy


@every_family_and_every_config
def test_a_fresh_adapter_changes_nothing_bit_for_bit(family, settings):
    expected = output(ALL[family]())

    assert torch.equal(output(get_peft_model(ALL[family](), config(blocks=BLOCKS.get(family), **settings))), expected)
    assert torch.equal(
        output(inject_adapter_in_model(config(blocks=BLOCKS.get(family), **settings), ALL[family]())), expected
    )


@every_family_and_every_config
def test_saved_and_loaded_by_peft_it_gives_the_same_output(family, settings, tmp_path):
    model = get_peft_model(ALL[family](), config(blocks=BLOCKS.get(family), **settings))
    scramble(model)
    model.save_pretrained(tmp_path)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(ALL[family](), tmp_path)

    assert not torch.allclose(output(model), output(ALL[family]()))
    assert torch.equal(output(loaded), output(model))
    assert isinstance(PeftConfig.from_pretrained(tmp_path), CoLoraConfig)


@every_family
@pytest.mark.parametrize("gate", [None, StaticGate(), StaticGate(Additive())], ids=str)
def test_merged_and_unloaded_it_is_the_base_class_again_with_the_same_output(family, gate, caplog):
    settings = {} if gate is None else {"gate": gate, "global_branch": True}
    model = get_peft_model(ALL[family]().double(), config(blocks=BLOCKS.get(family), **settings))
    scramble(model)
    before = output(model)

    with caplog.at_level(logging.WARNING, "lightning_pfl.adapters"):
        merged = model.merge_and_unload()

    torch.testing.assert_close(output(merged), before, atol=1e-12, rtol=1e-12)
    assert not any(isinstance(m, CoLoraLayer) for m in merged.modules())
    is_bias_free = family in ("llama", "gemma3", "qwen2", "t5", "whisper", "llava", "resnet", "efficientnet")
    assert ("layers a bias that they did not have" in caplog.text) == is_bias_free


@every_family
def test_merging_and_unmerging_restores_every_bit(family):
    model = get_peft_model(ALL[family](), config(blocks=BLOCKS.get(family), global_branch=True))
    scramble(model)
    expected, state = output(model), copy.deepcopy(model.state_dict())

    model.merge_adapter()
    torch.testing.assert_close(output(model), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()

    assert torch.equal(output(model), expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("act", ["merge_adapter", "merge_and_unload"])
def test_an_input_gate_refuses_to_merge_before_any_layer_is_touched(act):
    """The first layers hold an adapter that could be merged; only later ones hold the one that cannot."""
    model = get_peft_model(llama(), config())
    model.add_adapter("second", config(num_blocks=1, private_layers=False, global_branch=True, gate=InputGate()))
    scramble(model)
    model.base_model.set_adapter(["default", "second"])
    expected = output(model)

    with pytest.raises(ValueError, match="weighs the branches anew for every input"):
        getattr(model, act)()

    assert not any(layer.merged for layer in model.modules() if isinstance(layer, CoLoraLayer))
    assert torch.equal(output(model), expected)


@every_config
def test_disabled_it_is_the_base_model(settings):
    model = get_peft_model(llama(), config(**settings))
    scramble(model)
    expected = output(model)

    with model.disable_adapter():
        assert torch.equal(output(model), output(llama()))
        assert not trained(model)
    assert torch.equal(output(model), expected)
    assert trained(model)


@every_config
def test_a_second_adapter_lives_beside_the_first(settings):
    """Another rank, other blocks, no private layers: what is Co-LoRA in one is conventional or nothing in the other."""
    model = get_peft_model(llama(), config(**settings))
    scramble(model)
    first, own = output(model), trained(model)
    model.add_adapter("second", config(r=2, num_blocks=4, private_layers=False, global_branch=True))
    assert torch.equal(output(model), first)
    assert trained(model) == own

    model.set_adapter("second")
    assert torch.equal(output(model), output(llama()))
    kinds = {name.split(".")[-2] for name in trained(model)}
    assert kinds == {"colora_P", "colora_Q", "colora_gate"}
    assert all(name.endswith(".second") for name in trained(model))

    model.set_adapter("default")
    assert trained(model) == own
    assert torch.equal(output(model), first)
    model.delete_adapter("second")
    assert not any("second" in name for name in model.state_dict())
    assert torch.equal(output(model), first)


@every_config
def test_its_state_moves_between_injected_modules(settings):
    model, other = (inject_adapter_in_model(config(**settings), llama()) for _ in range(2))
    scramble(model)

    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))

    assert not result.unexpected_keys
    assert torch.equal(output(other), output(model))


def test_it_is_injected_from_the_keys_of_a_state():
    source = inject_adapter_in_model(config(), llama())
    keys = get_peft_model_state_dict(source)

    target = inject_adapter_in_model(config(), llama(), state_dict=keys)

    assert get_peft_model_state_dict(target).keys() == keys.keys()


@every_config
def test_transformers_own_adapter_methods_work(settings, tmp_path):
    model = llama()
    model.add_adapter(config(**settings))
    assert torch.equal(output(model), output(llama()))
    scramble(model)
    expected = output(model)

    model.disable_adapters()
    assert torch.equal(output(model), output(llama()))
    model.enable_adapters()
    assert torch.equal(output(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(llama(), tmp_path)), expected)
    loaded = llama()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(output(loaded), expected)


@pytest.mark.parametrize(
    ("family", "settings"),
    [case for case in CASES if case[0] in (*CAUSAL, *ENCODER_DECODERS, "llava")],
    ids=str,
)
def test_it_generates_as_its_full_forward_says(family, settings):
    """Greedy decoding through the cache gives the scores that one forward over prompt and answer gives.

    An input gate reads the prompt: labels from there on tell the full forward of a causal model where it ends.
    """
    model = get_peft_model(FAMILIES[family](), config(blocks=BLOCKS.get(family), **settings))
    scramble(model)
    given = inputs(model.get_base_model())
    names = ("decoder_input_ids", "decoder_input_ids") if family in ENCODER_DECODERS else ("input_ids", "labels")
    prompt = given.pop("decoder_input_ids", given.get("input_ids"))[:, -6:]
    keep = {"max_new_tokens": 4, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    start = {names[0]: prompt, **({} if family == "whisper" else {"attention_mask": torch.ones_like(prompt)})}
    if family == "t5":
        start["attention_mask"] = torch.ones_like(given["input_ids"])

    # Whisper's own `generate` cuts sound into pieces and chooses a language around the general one
    found = GenerationMixin.generate(model.get_base_model(), **{**given, **start}, **keep)

    ids = found.sequences
    first = ids.shape[1] - 4
    given[names[0]] = ids
    if names[1] == "labels":
        given["labels"] = ids.clone()
        given["labels"][:, :first] = -100
    with torch.no_grad():
        logits = model(**given).logits
    torch.testing.assert_close(logits[:, first - 1 : -1], torch.stack(found.scores, dim=1), atol=1e-5, rtol=1e-4)
    assert torch.equal(torch.stack(found.scores, dim=1).argmax(-1), ids[:, first:])


def test_a_choice_of_adapters_per_sample_is_refused_and_not_ignored():
    model = get_peft_model(llama(), config())
    with pytest.raises(ValueError, match="cannot be chosen per sample"):
        model(input_ids=torch.ones(2, 3, dtype=torch.long), adapter_names=["default", "__base__"])


def test_peft_can_say_what_it_holds():
    model = get_peft_model(llama(), config(global_branch=True))

    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.get_layer_status()[0].requires_grad == {"default": True}
    assert model.peft_config["default"].peft_type == "COLORA"
