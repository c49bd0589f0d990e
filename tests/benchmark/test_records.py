"""The published JSON format is read and written; a mistake names its file and record."""

import json

import pytest
from PIL import Image

from lightning_pfl.benchmark.edits import Turn
from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.records import (
    RecordError,
    parse_choices,
    read_records,
    read_task,
    records_path,
    write_task,
)
from lightning_pfl.benchmark.tasks import Example, Task


@pytest.fixture
def picture(tmp_path):
    image = Image.new("RGB", (6, 6), (255, 255, 255))
    image.paste((255, 0, 0), (0, 0, 3, 3))
    image.save(tmp_path / "p.png")
    return tmp_path / "p.png"


def _write(root, records, split="train"):
    path = records_path(root, "Set", 2, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return path


def _record(image="p.png", question="<image> What? Choice list:[cat, dog]", answer="cat"):
    return {"image": image, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def test_what_is_written_is_read_back(picture, tmp_path):
    def example(name, view):
        return Example(name, (view, View(picture)), "<image><image> Same? Choice list:[yes, no]", "no", ("yes", "no"))

    task = Task(
        "t",
        "f",
        (example("a", View(picture)),),
        (example("b", View(picture)),),
        (example("c", View(picture, (Turn(1),))),),
        ("MIT",),
    )

    write_task(task, tmp_path / "out", dataset="Set", subset_id=2, size=6)
    again = read_task(tmp_path / "out", "Set", 2)

    for before, after in ((task.train, again.train), (task.val, again.val), (task.test, again.test)):
        assert [(e.question, e.answer, e.choices) for e in after] == [(e.question, e.answer, e.choices) for e in before]
        for one, other in zip(before[0].images, after[0].images, strict=True):
            assert one.render(6).tobytes() == other.render(6).tobytes()
    assert again.test[0].id == "Set-2/test/0"


def test_published_variants_are_read(picture, tmp_path):
    records = [
        _record(image="p.png", question="What?", answer=3),  # one path, no mark, a number for an answer
        _record(image=["p.png", "p.png"], question="Which?\n [left, right]\n"),
        {"conversations": [{"value": "2+2?"}, {"value": " 4 "}], "extra": 1},  # no picture at all
    ]

    one, two, three = read_records(_write(tmp_path / "data", records), root=tmp_path)

    assert (one.question, one.answer, len(one.images)) == ("<image> What?", "3", 1)
    assert two.question.startswith("<image><image> Which?")
    assert two.choices == ("left", "right")
    assert (three.images, three.answer, three.choices) == ((), "4", ())


def test_without_a_validation_split_the_last_fifth_of_training_is_held_out(picture, tmp_path):
    _write(tmp_path, [_record(question=f"q{index}") for index in range(10)])
    _write(tmp_path, [_record()], split="test")

    task = read_task(tmp_path, "Set", 2)

    assert [len(task.train), len(task.val), len(task.test)] == [8, 2, 1]
    assert task.val[0].question.endswith("q8")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (_record(image="none.png"), r"#1 names the image none\.png"),
        (_record(question="<image><image> What?"), "#1 has 2 <image> marks for 1 pictures"),
        (_record(image=["p.png", "p.png"]), "#1 has only 1 <image> marks for 2 pictures"),
        ({"image": "p.png"}, "#1 must have `conversations`"),
        ({"conversations": [{"value": "q"}, {}]}, "#1 must have `conversations`"),
        ("text", "#1 must be an object"),
    ],
)
def test_a_mistake_names_file_and_record(picture, tmp_path, record, message):
    path = _write(tmp_path, [_record(), record])

    with pytest.raises(RecordError, match=message) as caught:
        read_records(path)
    assert str(caught.value).startswith(str(path))


def test_a_file_that_is_no_list_of_records_is_refused(tmp_path):
    path = _write(tmp_path, {})
    with pytest.raises(RecordError, match="must hold a list of records, but holds a dict"):
        read_records(path)
    path.write_text("[")
    with pytest.raises(RecordError, match="is not JSON"):
        read_records(path)


@pytest.mark.parametrize(
    ("question", "choices"),
    [
        ("x Choice lists: [A | B, b]", ("A", "B, b")),
        ("x Choice List:[one,two ,three]", ("one", "two", "three")),
        ("x\n [left, right]\n", ("left", "right")),
        ("no list", ()),
    ],
)
def test_choice_lists_of_all_published_forms_are_parsed(question, choices):
    assert parse_choices(question) == choices
