"""Tasks are balanced in any prefix, disjoint in their pictures, and their answers can be told apart."""

from pathlib import Path

import pytest

from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.tasks import Example, Task, balanced, check_disjoint, option_ids
from lightning_pfl.benchmark.tiny import tiny_tokenizer


def _example(index, answer, path="a.png"):
    return Example(str(index), (View(Path(path)),), "<image> ?", answer, ("yes", "no"))


def _task(train, val, test):
    return Task("t", "f", tuple(train), tuple(val), tuple(test), ("MIT",))


def test_balanced_takes_answers_in_turn_and_keeps_their_order():
    examples = [_example(index, answer) for index, answer in enumerate(["yes", "yes", "yes", "no", "yes", "no"])]

    taken = balanced(examples, 5)

    assert [example.answer for example in taken] == ["no", "yes", "no", "yes", "yes"]
    assert [example.id for example in taken] == ["3", "0", "5", "1", "2"]


def test_chance_is_the_share_of_the_most_frequent_test_answer():
    task = _task(
        [_example(0, "no")], [], [_example(0, "yes"), _example(1, "yes"), _example(2, "no"), _example(3, "yes")]
    )

    assert task.chance == 0.75
    assert task.choices == ("yes", "no")


def test_with_train_takes_the_first_examples_only():
    task = _task([_example(index, "no") for index in range(4)], [], [])

    assert [example.id for example in task.with_train(2).train] == ["0", "1"]
    with pytest.raises(ValueError, match="at least 1, but is 0"):
        task.with_train(0)


def test_a_picture_on_two_sides_is_refused():
    task = _task([_example(0, "no", "a.png")], [_example(1, "no", "b.png")], [_example(2, "no", "a.png")])

    with pytest.raises(ValueError, match=r"t: a\.png is shown both in train and in test"):
        check_disjoint(task)


def test_answers_with_the_same_first_token_are_refused():
    tokenizer = tiny_tokenizer()

    assert len(set(option_ids(tokenizer, ["red", "green", "blue"]))) == 3
    with pytest.raises(ValueError, match=r"'red' and 'red circle' both begin with 'red'"):
        option_ids(tokenizer, ["red", "green", "red circle"])
