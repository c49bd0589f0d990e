"""Listed nouns are in the form in which concepts are compared."""

from lightning_pfl.benchmark.images import normalise
from lightning_pfl.benchmark.taxonomy import _CATEGORY, category_of, concept_of


def test_every_listed_noun_is_its_own_normal_form():
    assert [noun for noun in _CATEGORY if normalise(noun) != noun] == []


def test_a_name_is_split_by_its_listed_head():
    assert concept_of("helmeted guinea hen") == concept_of("Hens") == "hen"
    assert category_of(concept_of("Two tomatoes")) == "food/vegetable"
