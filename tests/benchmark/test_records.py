"""The published JSON format is read and written; a mistake names its file and record."""

import json
import pickle

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from upath import UPath

from lightning_pfl.benchmark.choices import choices_with
from lightning_pfl.benchmark.edits import Turn
from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.records import (
    RecordError,
    UnknownTaskError,
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
        _record(image=["p.png", "p.png"], question="Which?\n [left, right]\n", answer="Right "),
        {"conversations": [{"value": "2+2?"}, {"value": " 4 "}], "extra": 1},  # no picture at all
    ]

    one, two, three = read_records(_write(tmp_path / "data", records), root=tmp_path)

    assert (one.question, one.answer, len(one.images)) == ("<image> What?", "3", 1)
    assert two.question.startswith("<image><image> Which?")
    assert (two.choices, two.answer) == (("left", "right"), "right")
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
        (_record(answer="bird"), r"#1 has the answer 'bird', which is none of its choices \['cat', 'dog'\]"),
        (_record(image=[3]), r"#1 must have a path or a list of paths as `image`, but has \[3\]"),
        (_record(image=""), "#1 must have a path or a list of paths"),
    ],
)
def test_a_mistake_names_file_and_record(picture, tmp_path, record, message):
    path = _write(tmp_path, [_record(), record])

    with pytest.raises(RecordError, match=message) as caught:
        read_records(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("empty", ["train", "test"])
def test_a_task_without_records_is_refused(picture, tmp_path, empty):
    """It would be sat out like an idle slot, or scored on nothing."""
    for split in ("train", "test"):
        _write(tmp_path, [] if split == empty else [_record()], split=split)

    with pytest.raises(RecordError, match=rf"Set/{empty}/dataset-2.json holds no records.*`dummy`"):
        read_task(tmp_path, "Set", 2)


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
        ("Which?\nA. red\nB. blue\n", ("A", "B")),
        ("Which?\nImage A: red\nImage B: blue", ("Image A", "Image B")),
        ("Choice list:[Image 1: a dog, Image 2: a cat]", ("Image 1", "Image 2")),
        ("Choice list:['red', 'blue']", ("red", "blue")),
        ("Print only the answer with a single answer id (1, 2, 3, 4, 5).", ("1", "2", "3", "4", "5")),
        ("A. one line only", ()),
    ],
)
def test_choice_lists_of_all_published_forms_are_parsed(question, choices):
    assert parse_choices(question) == choices


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Choice list:[a cat | a dog | a cow]", "A dog", (("a cat", "a dog", "a cow"), "a dog")),
        ("Choice list:[a cat | a dog | a cow]", "b", (("A", "B", "C"), "B")),
        ("Choice list:[x|y, z]", "x|y", (("x|y", "z"), "x|y")),
        ("Choice list:[yes, no]", "maybe", (("yes", "no"), None)),
        ("Why?", "because", ((), "because")),
    ],
)
def test_the_reading_of_a_list_that_has_the_answer_counts(question, answer, expected):
    assert choices_with(question, answer) == expected


def test_an_open_question_is_not_read_as_a_list(picture, tmp_path):
    path = _write(tmp_path, [_record(answer="a bird")])

    (example,) = read_records(path, is_open=True)
    assert (example.answer, example.choices) == ("a bird", ())


@pytest.mark.parametrize("name", ["p.png", "data/Set/p.png", "Set/p.png"])
def test_pictures_are_found_in_all_published_places(name, tmp_path):
    """Relative to the root, to its parent (as "dataset/Set/..."), and to the data set's own folder."""
    root = tmp_path / "data"
    path = _write(root, [_record(image=name)])
    Image.new("RGB", (2, 2)).save(root / "Set" / "p.png")

    (example,) = read_records(path)
    assert example.images[0].path == root / "Set" / "p.png"


def test_the_working_directory_is_tried_last(picture, tmp_path, monkeypatch):
    path = _write(tmp_path / "far" / "away", [_record()])
    monkeypatch.chdir(tmp_path)

    assert read_records(path)[0].images[0].render(6).getpixel((0, 0)) == (255, 0, 0)


def test_further_turns_are_told_of(picture, tmp_path, caplog):
    record = _record()
    record["conversations"] += [{"value": "And this?"}, {"value": "dog"}]
    read_records(_write(tmp_path, [record, _record()]))

    assert "1 of 2 records have further turns, which are left out" in caplog.text


def test_data_behind_an_address_is_read_like_a_folders(picture, monkeypatch):
    """A folder of pictures is listed once per file of records, however many pictures it names."""
    root = UPath("memory://bucket/dataset")
    for index in range(20):
        target = root / "Set" / "images" / f"{index}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(picture.read_bytes())
    for split in ("train", "test"):
        path = records_path(root, "Set", 2, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([_record(image=f"dataset/Set/images/{index}.png") for index in range(20)]))
    listed, ls = [], MemoryFileSystem.ls
    monkeypatch.setattr(
        MemoryFileSystem, "ls", lambda self, path, **options: listed.append(path) or ls(self, path, **options)
    )
    task = read_task("memory://bucket/dataset", "Set", 2)

    assert len(task.train) == 16
    assert task.test[3].images[0].render(6).getpixel((0, 0)) == (255, 0, 0)
    assert pickle.loads(pickle.dumps(task.test[3])).images[0].key(6) == View(picture).key(6)
    assert sum(path.endswith("Set/images") for path in listed) == 2
    with pytest.raises(UnknownTaskError, match=r"Of Set there are the train subsets \['2'\]"):
        read_task(root, "Set", 7)


def test_an_address_without_its_file_system_says_what_to_install():
    with pytest.raises(ValueError, match="Install the file system's package"):
        read_records("nosuchprotocol://bucket/Set/train/dataset-0.json")
