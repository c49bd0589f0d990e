"""States of frozen layers, computed once, give what the whole model gives."""

import pytest
import torch

from lightning_pfl.benchmark.batches import TaskDataset, collate
from lightning_pfl.benchmark.features import FeatureStore
from lightning_pfl.benchmark.states import LowerLayers, StateDataset, collate_states
from lightning_pfl.benchmark.tiny import PixelTokens, shape_tasks, tiny_gemma, tiny_llama, tiny_tokenizer, tiny_vlm


@pytest.fixture
def examples(tmp_path):
    """Two tasks whose questions differ in length, so that batches are padded."""
    tasks = shape_tasks(tmp_path / "pictures", num_examples=8)
    longer = [task.train for task in tasks[::3]]
    store = FeatureStore(PixelTokens(), folder=tmp_path / "features")
    return TaskDataset([*longer[0], *longer[1]], tiny_tokenizer(), store)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma])
@pytest.mark.parametrize("num_kept", [1, 2])
def test_a_cut_model_gives_the_scores_of_the_whole(make, num_kept, examples):
    module = tiny_vlm(make(num_layers=4))
    whole = module(collate([examples[index] for index in range(len(examples))]))

    lower = LowerLayers(module, num_kept)
    seen = StateDataset(examples, lower, batch_size=3)
    cut = lower.cut()

    assert len(cut.language_model.model.layers) == num_kept
    torch.testing.assert_close(cut(collate_states([seen[i] for i in range(len(seen))])), whole, atol=1e-5, rtol=1e-5)


def test_the_layers_that_are_kept_are_not_run_for_the_states(examples):
    module = tiny_vlm(tiny_llama(num_layers=3))
    ran = []
    for index, layer in enumerate(module.language_model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: ran.append(index))

    LowerLayers(module, 1).states(collate([examples[0]]))

    assert ran == [0, 1]


@pytest.mark.parametrize("num_kept", [0, 3, 4])
def test_there_must_be_layers_below_and_layers_kept(num_kept):
    with pytest.raises(ValueError, match="below the model's 3 layers"):
        LowerLayers(tiny_vlm(tiny_llama(num_layers=3)), num_kept)
