"""Promises of `lightning_pfl.relevance.causal_lm`: the closed form is the gradient, in every family."""

import logging
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lightning_pfl.relevance import CausalLMProbe, ColumnSketch

WORDS = 50
LLAMA = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
GEMMA = {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8}
OPT = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 16,
    "dropout": 0.1,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "qwen2, tied": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA, tie_word_embeddings=True)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)),
    "gemma3, capped": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA, final_logit_softcapping=0.5)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_embd=16, n_inner=24, n_layer=2, n_head=2, n_positions=32)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
    "opt, norm after and projected": lambda: OPTForCausalLM(
        OPTConfig(**{**OPT, "word_embed_proj_dim": 12, "do_layer_norm_before": False})
    ),
    "neox runs attention beside the mlp": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=WORDS,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    ),
}
UNKNOWN = {
    "granite scales residuals and logits": lambda: GraniteForCausalLM(
        GraniteConfig(**LLAMA, residual_multiplier=0.3, logits_scaling=4.0)
    ),
    "cohere scales logits": lambda: CohereForCausalLM(CohereConfig(**LLAMA, logit_scale=0.2)),
}


def built(make, seed=0):
    """A random model whose norms are not at their initial ones and zeros, so that a forgotten gain shows."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
            else:
                parameter.mul_(10.0)  # logits of some size: at nearly equal probabilities errors hide
    return model.eval()


def batch(seed=1):
    """Three texts with padding on the right and answers of 4, 2 and 1 tokens."""
    ids = torch.randint(1, WORDS, (3, 7), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(ids, -100)
    labels[0, 3:7] = ids[0, 3:7]
    labels[1, 4:6] = ids[1, 4:6]
    labels[2, 2] = ids[2, 2]
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mask[2, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@st.composite
def batches(draw):
    """Two or three texts, padded on either side; at least 2, 1 and 0 answer tokens, anywhere behind the first token."""
    count, width = draw(st.integers(2, 3)), draw(st.integers(3, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    ids = torch.randint(1, WORDS, (count, width), generator=generator)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, fewest in zip(range(count), (2, 1, 0), strict=False):
        length = draw(st.integers(fewest + 1, width))
        start = draw(st.sampled_from([0, width - length]))
        mask[row, start : start + length] = 1
        behind = list(range(start + 1, start + length))
        places = draw(st.lists(st.sampled_from(behind), min_size=fewest, unique=True)) if behind else []
        labels[row, places] = ids[row, places]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def by_autograd(model, name, data):
    """Mean over examples of the gradient of the model's own loss."""
    weight = model.get_parameter(name)
    total = torch.zeros_like(weight)
    for index in range(len(data["labels"])):
        example = {key: value[index : index + 1] for key, value in data.items()}
        loss = model(**example).loss
        weight.requires_grad_(True)
        loss = model(**example).loss
        total += torch.autograd.grad(loss, weight)[0]
        weight.requires_grad_(False)
    return total / len(data["labels"])


def target_of(model):
    names = ("down_proj.weight", "mlp.c_proj.weight", "fc2.weight", "dense_4h_to_h.weight")
    return [name for name, _ in model.named_parameters() if name.endswith(names)][-1]


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES.keys())
def test_the_closed_form_is_the_gradient_of_the_models_own_loss(make):
    """To rounding, in the parameter's own shape, without a backward pass."""
    model = built(make)
    probe = CausalLMProbe(model, size=64)
    probe.prepare()

    assert probe.closed_form
    exact = by_autograd(model, target_of(model), batch())
    closed = probe.gradient(batch())
    assert closed.shape == exact.shape
    assert (closed - exact).norm() / exact.norm() < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen2, tied", "gemma3", "gpt2", "opt"])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), data=batches())
def test_in_float64_the_closed_form_is_the_gradient_to_a_millionth(family, seed, data):
    """Against autograd through the model and a cross entropy in float64 (the model's own loss rounds to float32)."""
    model = built(FAMILIES[family], seed).double()
    probe = CausalLMProbe(model, size=64)
    probe.prepare()
    weight = model.get_parameter(target_of(model))
    weight.requires_grad_(True)
    each = []
    for index in range(len(data["labels"])):
        example = {key: value[index : index + 1] for key, value in data.items()}
        if (example["labels"] == -100).all():
            continue  # counts for nothing
        logits = model(input_ids=example["input_ids"], attention_mask=example["attention_mask"]).logits
        loss = nn.functional.cross_entropy(logits[0, :-1], example["labels"][0, 1:], ignore_index=-100)
        each.append(torch.autograd.grad(loss, weight)[0])
    weight.requires_grad_(False)
    exact = torch.stack(each).mean(dim=0)

    assert probe.closed_form
    closed = probe.gradient(data)
    assert closed.dtype == exact.dtype == torch.float64
    assert (closed - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_a_tail_that_is_not_understood_is_left_to_autograd_and_never_approximated(make, caplog):
    """Multipliers outside any layer do not show in the trace; the check against autograd finds them."""
    model = built(make)
    probe = CausalLMProbe(model, size=64)
    with caplog.at_level(logging.WARNING):
        probe.prepare()

    exact = by_autograd(model, target_of(model), batch())
    assert (probe.gradient(batch()) - exact).norm() / exact.norm() < 1e-5
    assert not probe.closed_form
    assert "autograd" in caplog.text


def test_the_sketch_is_the_projected_gradient_by_either_way(monkeypatch):
    """Closed form and autograd land in the same buckets, also for a transposed weight."""
    model = built(FAMILIES["gpt2"])
    closed = CausalLMProbe(model, size=128, seed=3)
    slow = CausalLMProbe(model, size=128, seed=3)
    closed.prepare()
    slow.prepare()
    monkeypatch.setattr(slow, "_tail", None)

    torch.testing.assert_close(closed.sketch(batch()), slow.sketch(batch()), rtol=1e-4, atol=1e-6)


def test_clipping_is_per_example():
    """With a bound that only the longest sketch exceeds, the mean is made of the others and of that one cut."""
    model = built(FAMILIES["llama"])
    data = batch()
    plain = CausalLMProbe(model, size=256)
    each = torch.stack([plain.sketch({key: value[i : i + 1] for key, value in data.items()}) for i in range(3)])
    bound = each.norm(dim=1).sort().values[1:].mean().item()

    clipped = CausalLMProbe(model, size=256, max_norm=bound).sketch(data)

    scale = (bound / each.norm(dim=1)).clamp(max=1.0)
    assert (scale < 1).sum() == 1
    torch.testing.assert_close(clipped, (each * scale[:, None]).mean(dim=0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(plain.sketch(data), each.mean(dim=0), rtol=1e-4, atol=1e-6)


def test_each_examples_sketch_is_told_apart_and_one_without_an_answer_has_zeros():
    """What is noised is a mean over n examples, whatever they hold; the mean sketch is over those with an answer."""
    model = built(FAMILIES["llama"])
    data = batch()
    data["labels"][1] = -100
    probe = CausalLMProbe(model, size=256, max_norm=0.5)

    rows = probe.sketches(data)

    assert rows.shape == (3, 256)
    assert not rows[1].any()
    assert rows.norm(dim=1).max() <= 0.5
    torch.testing.assert_close(probe.sketch(data), rows[[0, 2]].mean(dim=0))
    data["labels"][:] = -100
    assert not probe.sketches(data).any()


def test_another_projection_takes_the_place_of_the_count_sketch():
    """Columns kept apart, in the width of the layer that is looked at (24)."""
    probe = CausalLMProbe(built(FAMILIES["llama"]), projection=ColumnSketch(4, 24))

    assert probe.size == 96
    assert torch.equal(probe.sketch(batch()), ColumnSketch(4, 24)(probe.gradient(batch())))


def test_embeddings_may_stand_in_for_tokens():
    """Vision tokens enter as embeddings; the labels alone say where the answer is."""
    model = built(FAMILIES["llama"])
    probe = CausalLMProbe(model, size=64)
    data = batch()
    embedded = {**data, "inputs_embeds": model.get_input_embeddings()(data["input_ids"])}
    del embedded["input_ids"]

    torch.testing.assert_close(probe.sketch(embedded), probe.sketch(data))


def test_an_example_without_an_answer_does_not_count():
    """A truncated question neither dilutes the mean nor ends the run; a batch of nothing else is an error."""
    probe = CausalLMProbe(built(FAMILIES["llama"]), size=64)
    data = batch()
    two = {key: value[:2] for key, value in data.items()}
    data["labels"][2] = -100
    torch.testing.assert_close(probe.sketch(data), probe.sketch(two))

    data["labels"][:] = -100
    with pytest.raises(ValueError, match="answer"):
        probe.sketch(data)


def test_tokens_of_another_tokenizer_are_refused():
    """Otherwise the embedding raises an index error that says nothing."""
    probe = CausalLMProbe(built(FAMILIES["llama"]), size=64)
    data = batch()
    data["input_ids"][0, 0] = WORDS

    with pytest.raises(ValueError, match=f"knows {WORDS} tokens.*to_probe"):
        probe.sketch(data)


@pytest.mark.parametrize("value", [{"input_ids": torch.ones(1, 2)}, [torch.ones(1, 2)]])
def test_a_batch_in_another_form_is_refused_with_the_way_out(value):
    """A client's own batch that nobody turned into a probe batch."""
    with pytest.raises(ValueError, match=r"labels.*to_probe"):
        CausalLMProbe(built(FAMILIES["llama"]), size=64).sketch(value)


def test_equal_probes_give_equal_bits_also_after_a_pickle():
    """Clients hold copies; the hashes are drawn again from the seed and do not travel."""
    probe = CausalLMProbe(built(FAMILIES["gemma3"]), size=512, seed=5)
    first = probe.sketch(batch())

    copy = pickle.loads(pickle.dumps(probe))

    assert torch.equal(copy.sketch(batch()), first)
    assert copy._project._buckets._drawn.keys() == probe._project._buckets._drawn.keys()
    assert not torch.equal(CausalLMProbe(built(FAMILIES["gemma3"]), size=512, seed=6).sketch(batch()), first)


def test_a_probe_leaves_random_numbers_grad_mode_and_the_model_alone():
    """It runs in the middle of a client's training."""
    probe = CausalLMProbe(lambda: built(FAMILIES["opt"]), size=64)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)

    with torch.enable_grad():
        probe.prepare()
        sketch = probe.sketch(batch())
        assert torch.is_grad_enabled()

    assert torch.equal(torch.rand(3), expected)
    assert not sketch.requires_grad
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in probe._model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in probe._model.modules())


def test_a_folder_is_loaded_lazily_in_the_dtype_asked_for(tmp_path):
    """Nothing is read before `prepare`; bfloat16 changes the sketch by its rounding only."""
    built(FAMILIES["llama"]).save_pretrained(tmp_path)
    probe = CausalLMProbe(tmp_path, size=512, dtype=torch.bfloat16)
    assert probe._model is None
    probe.prepare()

    assert probe.closed_form
    assert probe._model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert {parameter.dtype for parameter in probe._model.parameters()} == {torch.bfloat16}
    exact = CausalLMProbe(str(tmp_path), size=512).sketch(batch())
    assert torch.cosine_similarity(probe.sketch(batch()), exact, dim=0) > 0.98


def test_a_model_handed_over_in_low_precision_is_checked_in_float32_and_gets_its_weights_back():
    """Gemma in bfloat16: autograd there is off by more than any tail would be, the closed form is not."""
    model = built(FAMILIES["gemma3"]).bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    probe = CausalLMProbe(model, size=64)
    probe.prepare()

    assert probe.closed_form
    after = model.state_dict()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )


def test_a_model_that_scales_its_logits_is_noticed_in_low_precision_too():
    """The check is as strict."""
    probe = CausalLMProbe(built(UNKNOWN["cohere scales logits"]), size=64, dtype=torch.bfloat16)
    probe.prepare()

    assert not probe.closed_form


def test_a_model_without_a_known_projection_asks_for_a_target():
    """And takes the one that is named."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(WORDS, 8)
            self.mixer = nn.Linear(8, 8)
            self.lm_head = nn.Linear(8, WORDS)

        def forward(self, input_ids, attention_mask=None):
            return self.lm_head(torch.relu(self.mixer(self.embed(input_ids))))

    with pytest.raises(ValueError, match=r"Odd.*target="):
        CausalLMProbe(Odd(), size=64).prepare()

    named = CausalLMProbe(Odd(), size=64, target="mixer")
    named.prepare()
    assert not named.closed_form  # the trace has no idea of the bare relu, the check has
    assert named.sketch(batch()).any()
