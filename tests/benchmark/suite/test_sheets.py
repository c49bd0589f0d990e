"""Contact sheets show the pictures of every example, and only those that may be shown."""

import pytest

from lightning_pfl.benchmark.suite.catalogue import find_task
from lightning_pfl.benchmark.suite.recipes import Sizes, build_task
from lightning_pfl.benchmark.suite.sheets import Row, clean_examples, contact_sheet


def test_a_sheet_holds_the_pictures_where_they_belong(library):
    task = build_task(find_task("K3"), library, Sizes(2, 2, 2))
    sheet = contact_sheet([Row("one", task.train), Row("two", task.val)], pixels=40, columns=1)

    for place, view in enumerate(task.train[0].images):
        left = place * 42
        assert sheet.crop((left, 21, left + 40, 61)).getpixel((20, 20)) == view.render(40).getpixel((20, 20))
    assert sheet.height > 2 * 60
    with pytest.raises(ValueError, match="at least one task"):
        contact_sheet([])


def test_clean_examples_leave_out_pictures_under_other_licences(library):
    task = build_task(find_task("K9"), library, Sizes(40, 5, 5))
    examples, pictures = clean_examples(task, library, 3)

    assert len({example.answer for example in examples}) == len(examples) == 3
    assert {picture.licence for picture in pictures} == {"CC-BY-SA-4.0"}
    assert "GPL-2.0-or-later" in task.licences
