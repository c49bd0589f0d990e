"""Promises of `lightning_pfl.adapters.readings`."""

from __future__ import annotations

import pytest
import torch

from lightning_pfl.adapters.readings import TextReader, match


class Words:
    """A tokenizer that cuts after every n characters, with a start token like Gemma's."""

    is_fast = True

    def __init__(self, every: int, start: bool = False) -> None:
        self.every, self.start = every, start

    def __call__(self, text, *, return_offsets_mapping, truncation, max_length):
        spans = [(i, min(i + self.every, len(text))) for i in range(0, len(text), self.every)]
        if self.start:
            spans = [(0, 0), *spans]
        spans = spans[:max_length]
        return {"input_ids": [1 + i for i in range(len(spans))], "offset_mapping": spans}


def test_positions_match_where_both_models_have_read_the_same_text():
    """Cut after 2 and after 3 characters: the same text has been read after 6 and at the end, 10."""
    two, three = TextReader(Words(2))(["abcdefghij"]), TextReader(Words(3, start=True))(["abcdefghij"])
    assert two.places.tolist() == [[2, 4, 6, 8, 10]]
    assert three.places.tolist() == [[-1, 3, 6, 9, 10]]

    first, second = match(two.places, three.places)

    assert first.last.tolist() == [2, 4]
    assert second.last.tolist() == [2, 4]


def test_effects_add_up_what_leads_to_a_shared_place_and_states_take_its_last_position():
    first, second = match(torch.tensor([[2, 4, 6, 8, 10, 12]]), torch.tensor([[3, 6, 9, 10, -1]]))
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]])[..., None]

    # shared: 6 and 10; what comes after 10 leads nowhere
    assert first.states(values).flatten().tolist() == [4.0, 16.0]
    assert first.effects(values).flatten().tolist() == [7.0, 24.0]
    assert second.effects(torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])[..., None]).flatten().tolist() == [3.0, 12.0]


def test_equal_places_match_one_to_one_and_rows_do_not_mix():
    places = torch.tensor([[0, 1, 2], [0, 1, -1]])
    first, second = match(places, places)
    values = torch.arange(6.0).view(2, 3, 1)

    assert first.last.tolist() == second.last.tolist() == [0, 1, 2, 3, 4]
    assert first.effects(values).flatten().tolist() == [0, 1, 2, 3, 4]


def test_tokens_of_one_character_count_once_at_their_last_position():
    """An emoji cut into three bytes: all three end at character 1."""
    first, second = match(torch.tensor([[1, 1, 1, 2]]), torch.tensor([[1, 2]]))

    assert first.last.tolist() == [2, 3]
    assert second.last.tolist() == [0, 1]
    assert first.effects(torch.ones(1, 4, 1)).flatten().tolist() == [3, 1]


def test_rows_without_a_shared_place_give_nothing():
    first, second = match(torch.tensor([[2, 4], [1, 2]]), torch.tensor([[3, 5], [2, -1]]))

    assert first.last.tolist() == [3]
    assert second.last.tolist() == [2]
    assert first.effects(torch.ones(2, 2, 1)).flatten().tolist() == [2]


def test_match_refuses_other_batches_and_places_that_shrink():
    with pytest.raises(ValueError, match="one row per text"):
        match(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="grow along a row, but row 0"):
        match(torch.tensor([[4, 2]]), torch.tensor([[2, 4]]))


def test_reader_pads_on_the_right_cuts_at_max_length_and_has_no_labels_on_padding():
    reading = TextReader(Words(1), max_length=3)(["ab", "abcdef"])

    assert reading.inputs["input_ids"].tolist() == [[1, 2, 0], [1, 2, 3]]
    assert reading.inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert reading.inputs["labels"].tolist() == [[1, 2, -100], [1, 2, 3]]
    assert reading.places.tolist() == [[1, 2, -1], [1, 2, 3]]


def test_reader_refuses_a_tokenizer_without_offsets():
    slow = Words(1)
    slow.is_fast = False

    with pytest.raises(TypeError, match="character offsets, which `Words` does not give"):
        TextReader(slow)(["a"])
