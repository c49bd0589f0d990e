"""Options that begin with one token are refused, by name of task and model."""

import pytest

from lightning_pfl.benchmark.suite.catalogue import find_task
from lightning_pfl.benchmark.suite.options import check_options, tokenizers_at_hand
from lightning_pfl.benchmark.suite.recipes import Sizes, build_task
from lightning_pfl.benchmark.tiny import tiny_tokenizer


def test_words_that_a_tokenizer_does_not_know_collide(library):
    task = build_task(find_task("A9"), library, Sizes(6, 6, 6))

    with pytest.raises(ValueError, match=r"A9-motion does not suit tiny: .*'left' and 'right'"):
        check_options(task, {"tiny": tiny_tokenizer()})


def test_yes_and_no_do_not(library):
    check_options(build_task(find_task("A3"), library, Sizes(5, 5, 5)), {"tiny": tiny_tokenizer()})


def test_nothing_is_downloaded_to_find_tokenizers(tmp_path):
    assert tokenizers_at_hand(cache=tmp_path) == {}
