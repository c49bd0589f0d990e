"""The catalogue has the published scenario's shape, and every task is sound on any library of pictures."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from lightning_pfl.benchmark.composition import files_of
from lightning_pfl.benchmark.images import split_of
from lightning_pfl.benchmark.records import parse_choices, write_task
from lightning_pfl.benchmark.suite.build import views_of
from lightning_pfl.benchmark.suite.catalogue import TASKS, UNSEEN, UnknownTaskError, find_task, find_tasks
from lightning_pfl.benchmark.suite.digests import PIXELS, expected_digests, record_digests, task_digests
from lightning_pfl.benchmark.suite.faces import LINES
from lightning_pfl.benchmark.suite.named import subject_of
from lightning_pfl.benchmark.suite.recipes import SMOKE, STANDARD, Sizes, build_task, chance, sources_of
from lightning_pfl.benchmark.suite.rendering import picture_path
from lightning_pfl.benchmark.suite.verify import leaks
from lightning_pfl.benchmark.tasks import IMAGE_MARK

ALL = (*TASKS, *UNSEEN)

# The published order of tasks, client by client.
PUBLISHED = """
Fashion200K-0 MagicBrush-0 VISION-0 FashionIQ-0 | VSR-0 VISION-1 Fashion200K-2 NLVR2-0
SEED-Bench-2-2 Fashion200K-1 NLVR2-1 CIRR-0 | VizWiz-0 IRFL-2 Bongard-HOI-1 MIT-States-0
IRFL-1 Bongard-OpenWorld-1 COMICS_Dialogue-0 IRFL-0 | Bongard-HOI-2 Bongard-OpenWorld-0 IRFL-3 Bongard-HOI-0
WCVQA-0 iconqa-2 Co-Instruct-DB-2 SEED-Bench-2-1 | TQA-0 WCVQA-3 iconqa-1 Co-Instruct-DB-1
Co-Instruct-DB-0 dvqa-0 WCVQA-1 iconqa-3 | iconqa-0 Co-Instruct-DB-3 SEED-Bench-2-0 WCVQA-2
"""


@pytest.fixture(scope="module")
def tasks(library):
    return {spec.name: build_task(spec, library, SMOKE) for spec in ALL}


def test_the_forty_tasks_take_the_places_of_the_published_ones():
    assert [spec.analogue for spec in TASKS] == PUBLISHED.replace("|", " ").split()
    assert [(spec.client, spec.time) for spec in TASKS] == [(client, time) for client in range(10) for time in range(4)]
    assert {spec.analogue for spec in TASKS if spec.open_ended} == {"iconqa-2", "iconqa-3"}
    assert len(UNSEEN) == 6
    assert len({spec.name for spec in ALL}) == 46


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.id)
def test_every_task_asks_in_the_published_form(spec, tasks):
    task = tasks[spec.name]

    assert (len(task.train), len(task.val), len(task.test)) == (32, 16, 16)
    for example in (*task.train, *task.val, *task.test):
        assert example.question.count(IMAGE_MARK) == len(example.images)
        assert example.answer in example.choices
        assert parse_choices(example.question) == (() if spec.open_ended else example.choices)
    assert len({(e.images, e.question) for e in task.train}) == 32


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.id)
def test_goals_are_dealt_out_in_turn(spec, tasks):
    """No answer leads by more than one, in any split and any prefix; a line of B7 stands for its mood."""
    mood_of = {line: mood for mood, lines in LINES.items() for line in lines}
    for examples in (tasks[spec.name].train, tasks[spec.name].val, tasks[spec.name].train[:16]):
        counts = Counter(mood_of.get(example.answer, example.answer) for example in examples)
        assert counts.keys() <= set(spec.goals)
        assert max(counts.values()) - min(counts[goal] for goal in spec.goals) <= 1


def test_no_picture_is_shown_on_two_sides_by_any_two_tasks(tasks):
    assert leaks(list(tasks.values()), near=False) == []


def test_pictures_lie_on_the_side_of_their_concept_and_public_ones_nowhere(tasks, library):
    for task in tasks.values():
        for split, examples in (("train", task.train), ("val", task.val), ("test", task.test)):
            for path in {path for example in examples for view in example.images for path in files_of(view)}:
                picture = library.picture(path)
                assert split_of(picture.concept) != "public"
                if subject_of(picture.concept) is None:
                    assert split_of(picture.concept) == split


def test_examples_depend_on_names_alone(library, tasks):
    random.seed(7)
    for spec in (find_task("A2"), find_task("B2"), find_task("K9")):
        assert build_task(spec, library, SMOKE) == tasks[spec.name]


def test_a_larger_size_begins_with_the_smaller_one(library, tasks):
    larger = build_task(find_task("K9"), library, Sizes(64, 16, 16))

    assert larger.train[:32] == tasks["K9-quality-what"].train


def test_every_task_names_licences_and_sources(tasks, library):
    for task in tasks.values():
        assert task.licences
        assert sources_of(task, library)
    assert sources_of(tasks["A3-defect-of-two"], library) == {"gcompris-qt-data 3.1-2": "CC-BY-SA-4.0"}
    assert tasks["A3-defect-of-two"].licences == ("CC-BY-SA-4.0",)


def test_chance_knows_that_some_examples_offer_few_of_many_answers(tasks):
    assert chance(tasks["B11-quality-select"]) == pytest.approx(0.25)
    assert chance(tasks["A3-defect-of-two"]) == pytest.approx(0.5)


def test_names_find_tasks_and_groups():
    assert find_tasks(["A1", "U", "A1-wear-count"]) == (find_task("A1"), *UNSEEN)
    assert find_tasks([]) == ALL
    with pytest.raises(UnknownTaskError, match=r"must be a task of the suite \(A1, A2.*U6\), but is 'Z9'"):
        find_task("Z9")


def test_a_task_that_runs_out_of_pictures_says_so(library):
    with pytest.raises(ValueError, match=r"U4-card-duel cannot make|holds no picture"):
        build_task(find_task("B7"), type(library)([]), SMOKE)


@pytest.mark.assets
def test_the_real_suite_is_sound():
    """Every task at the standard size, for the tokenizers at hand: sides, options, licences."""
    from lightning_pfl.benchmark.suite.library import load_library
    from lightning_pfl.benchmark.suite.options import check_options, tokenizers_at_hand

    real, tokenizers = load_library(), tokenizers_at_hand()
    made = [build_task(spec, real) for spec in ALL]

    assert leaks(made, near=False) == []
    for task in made:
        check_options(task, tokenizers)
        assert (len(task.train), len(task.val), len(task.test)) == (400, 100, 100)
        assert task.licences


@pytest.mark.assets
def test_the_real_suite_has_the_records_that_are_kept(tmp_path):
    """At the standard size, without rendering: an empty file stands where a picture would."""
    from lightning_pfl.benchmark.suite.library import load_library

    found, kept = {}, {}
    for spec in ALL:
        task = build_task(spec, load_library())
        folder = tmp_path / spec.name / "images"
        folder.mkdir(parents=True)
        for view in views_of(task):
            picture_path(folder, view, PIXELS).touch()
        write_task(task, tmp_path, dataset=spec.name, size=PIXELS)
        found[spec.name] = task_digests(record_digests(tmp_path, spec.name), []).records
        kept[spec.name] = expected_digests(spec.name, STANDARD, PIXELS).records

    assert found == kept
