"""Promises of `lightning_pfl.relevance.prompt_states`: questions are read without their answers."""

import pytest
import torch
from torch import nn

from lightning_pfl.relevance import CausalLMProbe
from lightning_pfl.relevance.prompt_states import prompt_states
from tests.relevance.test_causal_lm import FAMILIES

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


def probe(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    made = CausalLMProbe(model)
    made.prepare()
    return made, model


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_it_is_the_mean_of_what_enters_the_last_block_at_one_size(family):
    """Of two blocks the first one's output, which transformers hands out as the last but one hidden state."""
    made, model = probe(family)
    with torch.no_grad():
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states[-2]

    scaled = states / states.square().mean(dim=-1, keepdim=True).sqrt()

    torch.testing.assert_close(made.read({"input_ids": IDS}), scaled.mean(dim=1), atol=1e-4, rtol=1e-4)


def test_answers_and_what_follows_them_are_not_seen():
    made, _ = probe("llama")
    labels = torch.tensor([[-100, -100, -100, 8, -100], [-100, -100, -100, 6, 5]])
    mask = torch.ones_like(IDS)
    other = IDS.clone()
    other[:, 3:] = 1

    seen = made.read({"input_ids": IDS, "labels": labels, "attention_mask": mask})

    torch.testing.assert_close(made.read({"input_ids": other, "labels": labels, "attention_mask": mask}), seen)
    torch.testing.assert_close(made.read({"input_ids": IDS[:, :3]}), seen)


def test_padding_on_the_left_changes_nothing_but_rounding():
    """Llama's positions are relative, so where a question begins does not matter."""
    made, _ = probe("llama")
    padded = nn.functional.pad(IDS, (2, 0))
    mask = nn.functional.pad(torch.ones_like(IDS), (2, 0))

    found = made.read({"input_ids": padded, "attention_mask": mask})

    torch.testing.assert_close(found, made.read({"input_ids": IDS}), atol=1e-5, rtol=1e-5)


def test_what_stands_behind_the_block_is_not_run_and_no_hook_stays():
    made, model = probe("llama")

    def never(*_):
        raise AssertionError("the head is not needed")

    handle = model.lm_head.register_forward_pre_hook(never)
    made.read({"input_ids": IDS})
    handle.remove()
    assert model(input_ids=IDS).logits.shape == (2, 5, 50)
    assert not model.model.layers[-1]._forward_pre_hooks


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="`head` is part of no numbered block"):
        prompt_states(nn.Linear(2, 2), "head", {})
