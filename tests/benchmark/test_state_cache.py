"""States on disk are those that would be computed, and nothing else is taken for them."""

import pytest
import torch

from lightning_pfl.benchmark.batches import TaskDataset
from lightning_pfl.benchmark.features import FeatureStore
from lightning_pfl.benchmark.state_cache import StateCache
from lightning_pfl.benchmark.states import LowerLayers, StateDataset, collate_states
from lightning_pfl.benchmark.tiny import PixelTokens, shape_tasks, tiny_gemma, tiny_llama, tiny_tokenizer, tiny_vlm
from lightning_pfl.benchmark.vocabulary import KeptTokens


@pytest.fixture
def tasks(tmp_path):
    store = FeatureStore(PixelTokens(), folder=tmp_path / "features")
    made = shape_tasks(tmp_path / "pictures", num_examples=8)
    return [TaskDataset(task.train, tiny_tokenizer(), store) for task in (made[0], made[3])]


def rows(examples):
    return collate_states([examples[index] for index in range(len(examples))])


def test_what_is_read_is_what_was_computed(tasks, tmp_path):
    module = tiny_vlm(tiny_llama())
    computed = StateDataset(tasks[0], LowerLayers(module, 1))
    cache = StateCache(LowerLayers(module, 1), folder=tmp_path / "states")
    for _ in range(2):
        for name, value in rows(cache.get(tasks[0])).items():
            torch.testing.assert_close(value, rows(computed)[name], rtol=0, atol=0)


def test_layers_are_not_run_a_second_time(tasks, tmp_path):
    module = tiny_vlm(tiny_llama())
    StateCache(LowerLayers(module, 1), folder=tmp_path / "states").get(tasks[0])
    told = []
    StateCache(LowerLayers(module, 1), folder=tmp_path / "states").get(tasks[0], report=lambda *now: told.append(now))
    assert told == []


def test_other_weights_pictures_and_depths_have_other_files(tasks, tmp_path):
    moved = tiny_vlm(tiny_llama(num_layers=3))
    moved.projector.linear.weight.data[0, 0] += 1e-3
    lower = [
        LowerLayers(tiny_vlm(tiny_llama(num_layers=3)), 1),
        LowerLayers(tiny_vlm(tiny_llama(num_layers=3)), 2),
        LowerLayers(tiny_vlm(tiny_llama(num_layers=3, seed=1)), 1),
        LowerLayers(moved, 1),
        LowerLayers(tiny_vlm(tiny_gemma()), 1),
    ]
    for one in lower:
        for task in tasks:
            StateCache(one, folder=tmp_path / "states").get(task)
    assert len(list((tmp_path / "states").rglob("*.safetensors"))) == len(lower) * len(tasks)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma])
def test_a_model_with_the_answers_rows_only_scores_them_as_before(make, tasks):
    module = tiny_vlm(make())
    lower = LowerLayers(module, 1)
    seen = StateDataset(tasks[0], lower)
    cut = lower.cut()
    before = cut(rows(seen))
    kept = KeptTokens.of(row for task in tasks for row in task.options)
    kept.shrink(cut.language_model)
    assert cut.language_model.get_output_embeddings().weight.shape[0] == len(kept.ids)
    torch.testing.assert_close(cut(rows(seen.with_options(kept.places))), before, rtol=0, atol=0)


def test_tokens_that_were_not_kept_have_no_place():
    with pytest.raises(ValueError, match="Only 2 tokens were kept"):
        KeptTokens.of([[3, 7]]).places([3, 4])
