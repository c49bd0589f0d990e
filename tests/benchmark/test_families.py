"""Task families split by concept, ask in the published form, and say the same on every machine."""

import random

import pytest
from PIL import Image

from lightning_pfl.benchmark import families
from lightning_pfl.benchmark.edits import Turn
from lightning_pfl.benchmark.families import build_tasks, class_task, edited_task
from lightning_pfl.benchmark.images import Picture, split_of

NAMES = [first + second + "o" for first in "bcdfghjklm" for second in "aeiouy"]


@pytest.fixture
def pictures(tmp_path):
    """Sixty pictures, one file each: every third a bird, the others mammals."""
    made = []
    for index, name in enumerate(NAMES):
        Image.new("RGB", (2, 2), (index, 0, 0)).save(tmp_path / f"{name}.png")
        category = "animal/bird" if index % 3 == 0 else "animal/mammal"
        made.append(Picture(tmp_path / f"{name}.png", name, category, "google", name, "MIT"))
    return made


def _concepts(examples):
    return {view.path.stem for example in examples for view in example.images}


def test_a_class_task_shows_each_picture_once_on_the_side_of_its_concept(pictures):
    words = {"animal/bird": "bird", "animal/mammal": "mammal"}

    task = class_task("animal-x", "animal", pictures, words, "Which?")

    for split, examples in (("train", task.train), ("val", task.val), ("test", task.test)):
        assert sorted(_concepts(examples)) == sorted(name for name in NAMES if split_of(name) == split)
        assert len(_concepts(examples)) == len(examples)
    truth = {picture.path: words[picture.category] for picture in pictures}
    assert all(truth[example.images[0].path] == example.answer for example in task.train + task.test)
    assert [example.answer for example in task.train[:4]] == ["bird", "mammal", "bird", "mammal"]
    assert task.train[0].question == "<image> Which? Choice list:[bird, mammal]"
    assert task.licences == ("MIT",)


def test_an_edited_task_does_what_it_asks_about_and_is_balanced(pictures):
    recipes = {"up": lambda rng: (), "left": lambda rng: (Turn(1),)}

    task = edited_task("turn-x", "turn", pictures, recipes, "Which way?")

    assert len(task.train) == families.SPLIT_SIZES["train"]
    assert all(example.images[0].edits == (() if example.answer == "up" else (Turn(1),)) for example in task.test)
    assert [example.answer for example in task.val].count("up") == len(task.val) // 2
    for split, examples in (("train", task.train), ("val", task.val), ("test", task.test)):
        assert {split_of(name) for name in _concepts(examples)} == {split}


def test_the_same_pictures_give_the_same_examples_whatever_the_global_seed(pictures):
    recipes = {"up": lambda rng: (Turn(rng.randrange(4)),), "left": lambda rng: (Turn(1),)}

    random.seed(1)
    first = edited_task("turn-x", "turn", pictures, recipes, "Which way?")
    random.seed(2)

    assert edited_task("turn-x", "turn", pictures, recipes, "Which way?") == first


@pytest.mark.parametrize(
    ("make", "answers"),
    [
        (lambda: families.defect_task("google", 1), {"fine", "blurry", "noisy", "dark", "compressed"}),
        (lambda: families.place_task("google"), {"left", "right", "top", "bottom"}),
        (lambda: families.count_task("google"), {"one", "two", "three", "four"}),
        (lambda: families.shape_task("google"), {"circle", "triangle", "square"}),
    ],
)
def test_every_edited_family_is_balanced_and_renders(pictures, monkeypatch, make, answers):
    monkeypatch.setattr(families, "pictures_of", lambda domain: tuple(pictures))

    task = make()

    assert set(task.choices) == answers
    assert task.chance == pytest.approx(1 / len(answers), abs=0.01)
    for example in task.test[: len(answers)]:
        assert example.images[0].render(32).size == (32, 32)


def test_count_shows_as_many_copies_as_it_says(pictures, monkeypatch):
    monkeypatch.setattr(families, "pictures_of", lambda domain: tuple(pictures))
    words = ["one", "two", "three", "four"]

    for example in families.count_task("google").test:
        assert len(example.images[0].edits[0].places) == words.index(example.answer) + 1


def test_place_puts_the_thing_nearest_to_the_edge_that_it_says(pictures, monkeypatch):
    monkeypatch.setattr(families, "pictures_of", lambda domain: tuple(pictures))

    for example in families.place_task("google").test:
        edit = example.images[0].edits[0]
        gaps = {"left": edit.x, "right": 1 - edit.x - edit.scale, "top": edit.y, "bottom": 1 - edit.y - edit.scale}
        assert gaps[example.answer] <= 0.15


def test_unknown_names_say_what_there_is():
    with pytest.raises(ValueError, match=r"must be one of .*'animal'.*, but is 'opera'"):
        build_tasks(["opera"])
    with pytest.raises(ValueError, match=r"must be one of .*'photo'.*, but is 'opera'"):
        families.pictures_of("opera")


@pytest.mark.assets
@pytest.mark.parametrize("family", sorted(families.DOMAINS))
def test_the_real_families_are_sound(family):
    from lightning_pfl.benchmark.tasks import option_ids
    from lightning_pfl.benchmark.weights import GEMMA3_270M, SMOLLM2_135M, convert_language_model, load_tokenizer

    tasks = build_tasks([family])

    assert len(tasks) == len(families.DOMAINS[family]) >= 4
    for task in tasks:
        assert min(len(task.train), len(task.test)) >= 32
        assert task.chance < 0.6
        for name in (SMOLLM2_135M, GEMMA3_270M):
            assert len(set(option_ids(load_tokenizer(str(convert_language_model(name))), task.choices))) > 2
