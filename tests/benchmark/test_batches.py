"""Prompts, padding and options of a batch, worked out by hand on the tiny tokenizer."""

import pickle
from dataclasses import replace

import pytest
import torch

from lightning_pfl.benchmark.batches import IMAGE_ID, TaskData, TaskDataset, collate, prompt_ids
from lightning_pfl.benchmark.features import FeatureStore
from lightning_pfl.benchmark.tiny import PixelTokens, shape_tasks, tiny_tokenizer


@pytest.fixture
def task(tmp_path):
    return shape_tasks(tmp_path / "pictures", num_examples=8)[0]


@pytest.fixture
def store(tmp_path):
    return FeatureStore(PixelTokens(width=6), folder=tmp_path / "features")


class _Starting:
    """The tiny tokenizer with other tokens to begin with."""

    def __init__(self, bos, eos):
        self.bos_token_id, self.eos_token_id = bos, eos

    def __call__(self, text, add_special_tokens=True):
        return tiny_tokenizer()(text, add_special_tokens=add_special_tokens)


def test_a_prompt_is_start_question_pictures_answer(task):
    asked = tiny_tokenizer()("What colour has the thing ? Choice list:[red, green, blue, yellow]")["input_ids"]
    answer = tiny_tokenizer()("Answer:")["input_ids"]
    start = tiny_tokenizer().bos_token_id

    assert prompt_ids(task.train[0], tiny_tokenizer()) == [start, *asked, *[IMAGE_ID] * 5, *answer]
    two = replace(task.train[0], images=task.train[0].images * 2, question="<image><image> red ?")
    assert prompt_ids(two, tiny_tokenizer())[3:] == [*[IMAGE_ID] * 10, *answer]


def test_a_prompt_begins_with_the_beginning_of_text_else_the_end_of_text(task):
    assert prompt_ids(task.train[0], _Starting(99, 98))[0] == 99
    assert prompt_ids(task.train[0], _Starting(None, 98))[0] == 98
    with pytest.raises(ValueError, match="neither a beginning-of-text nor an end-of-text"):
        prompt_ids(task.train[0], _Starting(None, None))


def test_an_item_holds_the_features_of_its_pictures_and_the_right_answer(task, store):
    two = replace(task.train[1], images=(task.train[0].images[0], task.train[1].images[0]), question="<image><image> ?")
    data = TaskDataset([task.train[0], two], tiny_tokenizer(), store)

    expected = store.tokens([task.train[0].images[0], task.train[1].images[0]]).reshape(10, 6)
    assert torch.equal(data[1]["features"], expected)
    assert torch.equal(data[0]["features"], expected[:5])
    assert int(data[1]["answer"]) == two.choices.index(two.answer) == 1
    assert data[0]["option_ids"].tolist() == [tiny_tokenizer()(word)["input_ids"][0] for word in two.choices]


def test_a_batch_is_padded_left_for_text_and_right_for_features_and_options():
    def item(ids, features, options):
        return {
            "features": torch.ones(features, 2, dtype=torch.float16),
            "input_ids": torch.tensor(ids),
            "option_ids": torch.tensor(options),
            "answer": torch.tensor(0),
        }

    batch = collate([item([IMAGE_ID] * 5 + [7, 8], 5, [4, 5]), item([9], 0, [6])])

    assert batch["input_ids"].tolist() == [[-1] * 5 + [7, 8], [0] * 6 + [9]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [0] * 6 + [1]]
    assert batch["option_ids"].tolist() == [[4, 5], [6, -1]]
    assert batch["features"].shape == (2, 5, 2)
    assert batch["features"][1].abs().sum() == 0


def test_an_answer_that_is_no_choice_is_refused_by_name(task, store):
    with pytest.raises(ValueError, match=r"The answer of colour-255/train/0 must be one of .* but is 'pink'"):
        TaskDataset([replace(task.train[0], answer="pink")], tiny_tokenizer(), store)


def test_choices_that_begin_alike_are_refused_by_name(task, store):
    twins = replace(task.train[0], choices=("red", "red circle"), answer="red")
    with pytest.raises(
        ValueError, match=r"colour-255/train/0 cannot be scored by first tokens: .*'red' and 'red circle'"
    ):
        TaskDataset([twins], tiny_tokenizer(), store)


def test_the_data_module_serves_every_example_once_and_can_be_pickled(task, store):
    data = pickle.loads(pickle.dumps(TaskData(task, tiny_tokenizer(), store, batch_size=3)))

    assert [len(batch["answer"]) for batch in data.train_dataloader()] == [3, 3, 2]
    in_order = torch.cat([batch["answer"] for batch in data.test_dataloader()])
    assert in_order.tolist() == [example.choices.index(example.answer) for example in task.test]
    torch.manual_seed(0)
    first, second = ([batch["features"] for batch in data.train_dataloader()] for _ in range(2))
    assert not all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
