"""Public data: any iterable, one order, some held out."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_pfl.adapters.public_data import PublicData
from lightning_pfl.adapters.readings import Reading
from tests.adapters.test_readings import Words

TEXTS = [f"text number {index}" for index in range(10)]


def public(data, held_out=5):
    return PublicData(data, ["a", "b"], {"a": Words(2), "b": Words(3)}, ask_for_words=False, held_out=held_out)


def lengths(found):
    """Characters of each record, as the last place tells."""
    return [int(record["a"].places.max()) for record, _ in found.records()]


def record(value: int) -> dict[str, Reading]:
    ids = torch.full((1, 3), value)
    return dict.fromkeys("ab", Reading({"input_ids": ids}, torch.arange(3)[None]))


@pytest.mark.parametrize(
    "data",
    [
        TEXTS,
        tuple(TEXTS),
        (text for text in TEXTS),
        DataLoader(TEXTS, batch_size=4),
        [TEXTS[:3], TEXTS[3:]],
    ],
    ids=["list", "tuple", "generator", "DataLoader", "lists of texts"],
)
def test_texts_come_from_any_iterable(data):
    assert lengths(public(data)) == [len(text) for text in TEXTS]


def test_every_fifth_is_held_out_and_kept_once():
    found = public(TEXTS)
    for _ in range(2):
        assert [held for _, held in found.records()] == [False, False, False, False, True] * 2
    assert [int(kept["a"].places.max()) for kept in found.kept] == [len(TEXTS[4]), len(TEXTS[9])]


def test_records_come_in_a_DataLoader_that_leaves_them_as_they_are():
    loader = DataLoader([record(value) for value in range(6)], batch_size=2, collate_fn=list)
    values = [int(found["b"].inputs["input_ids"][0, 0]) for found, _ in public(loader).records()]
    assert values == [0, 1, 2, 3, 4, 5]


def test_a_generator_is_refused_where_two_passes_are_needed_before_it_is_touched():
    generator = (text for text in TEXTS)
    with pytest.raises(ValueError, match=r"Descent needs 2 passes .* but `data` is a generator"):
        public(generator).check_passes(2, "Descent")
    assert next(generator) == TEXTS[0]
    public(generator).check_passes(1, "Descent")
    public(TEXTS).check_passes(2, "Descent")


def test_a_stream_that_is_spent_after_one_pass_is_told_from_one_that_never_had_anything():
    class Stream(IterableDataset):
        def __init__(self, texts):
            self.left = iter(texts)

        def __iter__(self):
            return self.left

    found = public(DataLoader(Stream(TEXTS), batch_size=None))
    assert len(lengths(found)) == 10
    with pytest.raises(ValueError, match="gives no item any more in a second pass"):
        lengths(found)
    with pytest.raises(ValueError, match=r"gives no item\."):
        lengths(public([]))


@pytest.mark.parametrize("items", [TEXTS, [record(value) for value in range(10)]], ids=["texts", "records"])
def test_data_in_another_order_is_refused_since_what_is_held_out_would_be_fitted(items):
    torch.manual_seed(0)
    found = public(DataLoader(items, batch_size=2, shuffle=True, collate_fn=list))
    list(found.records())
    with pytest.raises(ValueError, match=r"same items in the same order .* shuffle=False"):
        list(found.records())


def test_what_is_no_public_data_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"but is one str. Pass a list of texts"):
        public("captions.txt")
    with pytest.raises(TypeError, match=r"item 1 is a mapping with the keys \['text'\].*row\['text'\]"):
        list(public(["fine", {"text": "a row"}]).records())
    with pytest.raises(TypeError, match="item 0 is Tensor"):
        list(public([torch.ones(3)]).records())


def test_texts_ask_all_models_for_the_same_words_behind_every_word():
    """Cut after 2 and after 3 characters, both have read 6 and 12 characters; a word ends at 6 and at the end."""

    class Asked(Words):
        def __init__(self, every, first):
            super().__init__(every)
            self.first = first

        def get_vocab(self):
            return {f"\u2581{letter * 3}": self.first + index for index, letter in enumerate("abcdefgh")}

    found = PublicData(
        ["abcdef hijkl"] * 2, ["a", "b"], {"a": Asked(2, 0), "b": Asked(3, 100)}, ask_for_words=True, held_out=2
    )
    one, other = (record for record, _ in found.records())
    assert one["a"].inputs["asked"].tolist() == [[0, 2], [0, 5]]
    assert one["b"].inputs["asked"].tolist() == [[0, 1], [0, 3]]
    assert torch.equal(one["a"].inputs["contrast"] + 100, one["b"].inputs["contrast"])
    assert not torch.equal(one["a"].inputs["contrast"], other["a"].inputs["contrast"])
