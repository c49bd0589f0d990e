"""All mistakes of a folder at once, each with its file and record."""

import json

import pytest
from PIL import Image

from lightning_pfl.benchmark.mistakes import find_mistakes
from lightning_pfl.benchmark.records import records_path
from lightning_pfl.benchmark.scenarios import Scenario, ScenarioClient, Slot


def record(image="Set/images/a.png", question="<image> What? Choice list:[cat, dog]", answer="cat"):
    return {"image": image, "conversations": [{"value": question}, {"value": answer}]}


def write(root, records, split="train", dataset="Set", subset=0):
    path = records_path(root, dataset, subset, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(records if isinstance(records, str) else json.dumps(records))


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "dataset" / "Set" / "images"
    folder.mkdir(parents=True)
    Image.effect_noise((64, 64), 50).save(folder / "a.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:900])
    (folder / "text.png").write_text("not a picture")
    return tmp_path / "dataset"


def test_a_good_folder_has_none(root):
    write(root, [record()])
    write(root, [record()], "test")

    assert find_mistakes(root) == []


def test_every_mistake_is_found_with_its_place(root):
    write(
        root,
        [
            record(),
            record(image="Set/images/none.png"),
            record(image=["Set/images/cut.png"]),
            record(answer="bird"),
            record(question="<image><image> What?"),
            record(image="Set/images/text.png"),
            record(image="Set/images/cut.png"),
            record(image=7),
        ],
    )
    write(root, "[", "test")
    write(root, [], "val")
    seen = []
    found = find_mistakes(root, report=seen.append)

    places = [(mistake.file.split("/")[-2], mistake.record) for mistake in found]
    assert places == [("train", n) for n in (1, 2, 3, 4, 5, 6, 7)] + [("val", None), ("test", None)]
    for mistake, words in zip(
        found,
        [
            "none.png",
            "is damaged",
            "'bird'",
            "2 <image> marks",
            "is damaged",
            "is damaged",
            "`image`",
            "no records",
            "JSON",
        ],
        strict=True,
    ):
        assert words in mistake.message
        assert mistake.file in mistake.message
    assert len(seen) == 3


def test_pictures_may_be_left_closed(root):
    write(root, [record(image="Set/images/cut.png")])
    write(root, [record()], "test")

    assert find_mistakes(root, open_images=False) == []
    assert len(find_mistakes(root)) == 1


def test_a_subset_without_its_other_split_is_a_mistake(root):
    write(root, [record()], subset=3)

    (mistake,) = find_mistakes(root)
    assert mistake.message.endswith("test/dataset-3.json does not exist.")


def test_a_scenario_says_what_must_be_there_and_what_is_open(root):
    write(root, [record(answer="bird")])
    write(root, [record(answer="bird")], "test")
    slots = (Slot("Set", 0, "open-ended"), Slot("dummy"), Slot("Gone", 1))
    found = find_mistakes(root, scenario=Scenario((ScenarioClient(0, "m", slots),)))

    assert [mistake.message.split("/")[-3] for mistake in found] == ["Gone", "Gone"]
