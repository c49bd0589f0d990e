"""The last layer for the last position alone gives what the whole layer gives."""

import pytest
import torch

from lightning_pfl.adapters import CoLoraConfig, InputGate, adapter_parameters, inject
from lightning_pfl.benchmark.batches import TaskDataset
from lightning_pfl.benchmark.features import FeatureStore
from lightning_pfl.benchmark.last_position import ends_in_one_layer
from lightning_pfl.benchmark.states import LowerLayers, StateDataset, collate_states
from lightning_pfl.benchmark.tiny import PixelTokens, shape_tasks, tiny_gemma, tiny_llama, tiny_tokenizer, tiny_vlm


@pytest.fixture
def examples(tmp_path):
    """Two tasks whose questions differ in length, so that batches are padded."""
    tasks = shape_tasks(tmp_path / "pictures", num_examples=8)
    store = FeatureStore(PixelTokens(), folder=tmp_path / "features")
    return TaskDataset([*tasks[0].train, *tasks[3].train], tiny_tokenizer(), store)


def cut_module(examples, make, num_layers, *, num_kept=1, **config):
    module = tiny_vlm(make(num_layers=num_layers))
    lower = LowerLayers(module, num_kept)
    seen = StateDataset(examples, lower)
    cut = lower.cut()
    inject(cut, CoLoraConfig(r=4, alpha=8, num_blocks=1, exclude_modules=["projector"], private_layers=False, **config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in adapter_parameters(cut).pq.values():
            torch.nn.init.normal_(parameter.data, std=0.3)
    return cut, collate_states([seen[index] for index in range(len(seen))])


def answered(module, batch, *, only_last_position):
    """Scores of the answers, and gradients of all adapters."""
    module.only_last_position = only_last_position
    module.zero_grad()
    scores = module(batch)
    torch.nn.functional.cross_entropy(scores, batch["answer"]).backward()
    return scores.detach(), {name: p.grad.clone() for name, p in adapter_parameters(module).pq.items()}


@pytest.mark.parametrize(("make", "num_layers"), [(tiny_llama, 2), (tiny_gemma, 2), (tiny_gemma, 6)])
def test_scores_and_gradients_are_those_of_the_whole_layer(make, num_layers, examples):
    """Gemma's sixth layer attends to everything, the others to a window."""
    module, batch = cut_module(examples, make, num_layers)
    scores, gradients = answered(module, batch, only_last_position=False)
    again, others = answered(module, batch, only_last_position=True)
    torch.testing.assert_close(again, scores, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(others[name], gradient, atol=1e-5, rtol=1e-4)


def test_a_window_that_is_shorter_than_the_text_is_kept_to(examples):
    module, batch = cut_module(examples, tiny_gemma, 2)
    module.language_model.config.sliding_window = module.language_model.model.layers[0].self_attn.sliding_window = 5
    scores, _ = answered(module, batch, only_last_position=False)
    again, _ = answered(module, batch, only_last_position=True)
    torch.testing.assert_close(again, scores, atol=1e-5, rtol=1e-5)


def test_only_the_last_position_passes_the_perceptron(examples):
    module, batch = cut_module(examples, tiny_llama, 2)
    seen = []
    module.language_model.model.layers[0].mlp.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    answered(module, batch, only_last_position=True)
    assert seen == [1]


def test_two_layers_and_gates_that_read_all_of_their_input_are_run_whole(examples):
    one, _ = cut_module(examples, tiny_llama, 3)
    two, _ = cut_module(examples, tiny_llama, 3, num_kept=2)
    gated, _ = cut_module(examples, tiny_llama, 3, gate=InputGate(), global_branch=True)
    bodies = [module.language_model.get_decoder() for module in (one, two, gated)]
    assert [ends_in_one_layer(body) for body in bodies] == [True, False, False]
