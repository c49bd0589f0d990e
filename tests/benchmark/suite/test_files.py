"""What is built can be stopped, resumed, read back and verified; what is broken is found and named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from lightning_pfl.benchmark.records import read_task
from lightning_pfl.benchmark.scenarios import load_tasks, read_scenario
from lightning_pfl.benchmark.suite import build as building
from lightning_pfl.benchmark.suite.build import build
from lightning_pfl.benchmark.suite.catalogue import TASKS, find_task, find_tasks
from lightning_pfl.benchmark.suite.digests import task_digests
from lightning_pfl.benchmark.suite.recipes import SMOKE, Sizes, build_task
from lightning_pfl.benchmark.suite.rendering import render_all
from lightning_pfl.benchmark.suite.scenario import ASSIGNMENTS, scenario
from lightning_pfl.benchmark.suite.verify import leaks, verify

SIZES = Sizes(4, 4, 4)
SPECS = find_tasks(["A2", "K2", "K9"])


@pytest.fixture(scope="module")
def built(library, tmp_path_factory):
    root = tmp_path_factory.mktemp("suite")
    build(SPECS, library, root, sizes=SIZES, pixels=32)
    return root


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built, tmp_path / "suite")


def test_records_read_back_as_they_were_drawn(built, library):
    for spec in SPECS:
        task, read = build_task(spec, library, SIZES), read_task(built, spec.name, 0)
        for drawn, found in ((task.train, read.train), (task.val, read.val), (task.test, read.test)):
            assert [(e.question, e.answer) for e in drawn] == [(e.question, e.answer) for e in found]
            for example, other in zip(drawn, found, strict=True):
                for view, shown in zip(example.images, other.images, strict=True):
                    assert Image.open(shown.path).convert("RGB").tobytes() == view.render(32).tobytes()


def test_the_same_bytes_wherever_the_cache_lies(built, library, pictures, tmp_path):
    """Other paths for the same files: records name pictures by what is in them."""
    moved = [replace(p, path=tmp_path / "else" / p.domain / p.path.name) for p in pictures]
    for old, new in zip(pictures, moved, strict=True):
        new.path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(old.path, new.path)
    build(SPECS[:1], type(library)(moved, doubles=frozenset()), tmp_path / "again", sizes=SIZES, pixels=32)

    name = SPECS[0].name
    first, second = ((root / name / "train" / "dataset-0.json").read_bytes() for root in (built, tmp_path / "again"))
    assert first == second


def test_all_holds_for_what_was_built(built, library):
    assert verify(built, library) == []


def test_manifests_licences_scenarios_and_graph_lie_beside_the_tasks(built):
    manifest = json.loads((built / "K9-quality-what" / "manifest.json").read_text())
    assert manifest["analogue"] == "Co-Instruct-DB-0"
    assert manifest["licences"]
    assert "| K9-quality-what | gcompris-qt-data 3.1-2 | CC-BY-SA-4.0 |" in (built / "LICENCES.md").read_text()
    assert len(json.loads((built / "task_graph.json").read_text())) > 20
    assert {path.stem for path in (built / "scenarios").glob("*.json")} == set(ASSIGNMENTS)


def test_scenarios_have_the_published_form():
    clients = scenario(ASSIGNMENTS["suite-mixed"])

    assert [client["client_id"] for client in clients] == list(range(10))
    assert [data["dataset"] for client in clients for data in client["datasets"]] == [spec.name for spec in TASKS]
    assert clients[6]["datasets"][1] == {"dataset": "K2-count", "subset_id": 0, "type": "open-ended", "metric": "F1"}
    assert len({client["model_id"] for client in clients}) == 2
    with pytest.raises(ValueError, match=r"one model for each of 10 clients, but has 1"):
        scenario(["a"])


def test_a_scenario_and_the_tasks_of_a_small_suite_are_read_as_published_data(library, tmp_path):
    """Ten clients of four slots each, none of them twice; the two open tasks offer no choices."""
    build(TASKS, library, tmp_path, sizes=SMOKE, pixels=16)
    read = read_scenario(tmp_path / "scenarios" / "suite-mixed.json")
    tasks = load_tasks(read, tmp_path)

    assert [client.number for client in read.clients] == list(range(10))
    assert [slot.dataset for client in read.clients for slot in client.slots] == [spec.name for spec in TASKS]
    assert list(tasks) == [f"{spec.name}-0" for spec in TASKS]
    assert read.train_sizes(tasks) == {f"client-{number}": (32, 32, 32, 32) for number in range(10)}
    open_ended = {name for name, task in tasks.items() if not any(example.choices for example in task.train)}
    assert open_ended == {slot.task for slot in read.slots if slot.is_open} == {"K2-count-0", "K12-sum-0"}


def test_a_build_that_was_stopped_goes_on_without_rendering_again(library, tmp_path, monkeypatch):
    class StopError(RuntimeError):
        pass

    def stop_after_one(views, folder, pixels):
        render_all(views[:1], folder, pixels)
        raise StopError

    monkeypatch.setattr(building, "render_all", stop_after_one)
    with pytest.raises(StopError):
        build(SPECS[:1], library, tmp_path, sizes=SIZES, pixels=32)
    assert not (tmp_path / SPECS[0].name / "manifest.json").exists()
    (before,) = (tmp_path / SPECS[0].name / "images").glob("*.png")
    stamp = before.stat().st_mtime_ns

    monkeypatch.undo()
    counted = []
    build(SPECS[:1], library, tmp_path, sizes=SIZES, pixels=32, progress=lambda *what: counted.append(what))

    assert before.stat().st_mtime_ns == stamp
    assert counted[-1][1] == counted[-1][2]
    assert verify(tmp_path, library) == []


def test_what_a_killed_build_left_half_written_is_cleared_away(library, tmp_path):
    folder = tmp_path / SPECS[0].name / "images"
    folder.mkdir(parents=True)
    (folder / ".0123.77.part").write_bytes(b"half a picture")

    build(SPECS[:1], library, tmp_path, sizes=SIZES, pixels=32)

    assert not list(folder.glob(".*"))
    assert verify(tmp_path, library, near=False) == []


def test_a_second_build_into_the_same_folder_waits(library, tmp_path):
    from filelock import FileLock, Timeout

    seen = []

    def progress(*_):
        with pytest.raises(Timeout):
            FileLock(tmp_path / ".build.lock").acquire(timeout=0)
        seen.append(True)

    build(SPECS[:1], library, tmp_path, sizes=SIZES, pixels=32, progress=progress)

    assert seen
    FileLock(tmp_path / ".build.lock").acquire(timeout=0)


def test_workers_are_started_once_and_not_per_task(library, tmp_path, monkeypatch):
    """A worker imports the whole package and opens pictures that the next task shows again."""
    started = []
    pool = building.ProcessPoolExecutor
    monkeypatch.setattr(building, "ProcessPoolExecutor", lambda *a, **k: started.append(a) or pool(*a, **k))

    build(SPECS[:2], library, tmp_path, sizes=Sizes(1, 1, 1), pixels=32, workers=2)

    assert len(started) == 1
    assert verify(tmp_path, library, near=False) == []


def test_another_size_in_the_same_folder_is_refused(copy, library):
    with pytest.raises(ValueError, match=r"'pixels': 32.*but.*'pixels': 48.*is asked for"):
        build(SPECS, library, copy, sizes=SIZES, pixels=48)


def test_a_task_that_an_older_recipe_made_is_built_again(copy, library, monkeypatch, caplog):
    """Its own manifest agrees with its records, but not the digests that are kept; those of K2 do."""
    kept = {name: task_digests(building.record_digests(copy, name), []) for name in ("A2-edit-made", "K2-count")}
    monkeypatch.setattr(building, "expected_digests", lambda name, sizes, pixels: kept.get(name))
    for name in ("A2-edit-made", "K9-quality-what"):
        records, manifest = copy / name / "test" / "dataset-0.json", copy / name / "manifest.json"
        records.write_text(records.read_text().replace("Choice list", "Old choice list"))
        now = json.loads(manifest.read_text()) | {"records": building.record_digests(copy, name)}
        manifest.write_text(json.dumps(now))
    stamps = {path: path.stat().st_mtime_ns for path in copy.rglob("*.png")}

    build(SPECS, library, copy, sizes=SIZES, pixels=32)

    assert task_digests(building.record_digests(copy, "A2-edit-made"), []) == kept["A2-edit-made"]
    assert "Old choice list" in (copy / "K9-quality-what" / "test" / "dataset-0.json").read_text()
    assert caplog.messages == [f"{copy / 'A2-edit-made'} holds records of an older recipe and is built again."]
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*.png")} == stamps


def test_a_check_can_refuse_a_task_before_it_is_written(library, tmp_path):
    def refuse(task):
        raise ValueError(f"{task.name} will not do")

    with pytest.raises(ValueError, match="A2-edit-made will not do"):
        build(SPECS, library, tmp_path, sizes=SIZES, pixels=32, check=refuse)
    assert not list(tmp_path.rglob("*.png"))


def test_a_truncated_picture_is_found(copy, library):
    victim = sorted((copy / "K9-quality-what" / "images").glob("*.png"))[0]
    victim.write_bytes(victim.read_bytes()[:60])

    problems = verify(copy, library, near=False)

    assert any(str(victim) in problem.what and "damaged" in problem.what for problem in problems)


def test_an_unknown_task_is_found(copy, library):
    manifest = copy / "K9-quality-what" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"task": "K9-quality-what"', '"task": "K99-quality-what"'))

    (problem,) = verify(copy, library, near=False)

    assert problem.task == "K9-quality-what"
    assert "must be a task of the suite" in problem.what
    assert "'K99-quality-what'" in problem.what


def test_a_missing_picture_is_found(copy, library):
    victim = sorted((copy / "K9-quality-what" / "images").glob("*.png"))[0]
    victim.unlink()

    assert any(victim.name in problem.what for problem in verify(copy, library, near=False))


def test_other_pixels_and_other_answers_are_found(copy, library):
    for picture in (copy / "A2-edit-made" / "images").glob("*.png"):
        Image.new("RGB", (32, 32), "red").save(picture)
    records = copy / "K9-quality-what" / "test" / "dataset-0.json"
    records.write_text(records.read_text().replace('"clean"', '"dark"'))

    found = {(problem.task, problem.what.split(" ")[-1]) for problem in verify(copy, library, near=False)}

    whats = [problem.what for problem in verify(copy, library, near=False)]
    assert any("has other pixels" in what for what in whats)
    assert any("a JSON file is not the one that was built" in what for what in whats)
    assert any("the test records differ" in what for what in whats)
    assert {task for task, _ in found} == {"A2-edit-made", "K9-quality-what"}


def test_files_that_everybody_else_has_otherwise_are_found(copy, library, monkeypatch):
    """The list of digests is asked for the sizes that were built, and each of its digests is compared."""
    from lightning_pfl.benchmark.suite import verify as verifying
    from lightning_pfl.benchmark.suite.digests import pixels_of

    asked = []
    views = building.views_of(build_task(find_task("K9"), library, SIZES))
    contents = [pixels_of(building.picture_path(copy / "K9-quality-what" / "images", view, 32)) for view in views]
    right = task_digests(building.record_digests(copy, "K9-quality-what"), contents)

    def expected(name, sizes, pixels):
        asked.append((name, sizes, pixels))
        return right if name.startswith("K9") else None

    monkeypatch.setattr(verifying, "expected_digests", expected)
    assert verify(copy, library, near=False) == []
    assert ("K9-quality-what", SIZES, 32) in asked

    right = replace(right, records={**right.records, "val": "0" * 16}, pictures="f" * 16)
    whats = [problem.what for problem in verify(copy, library, near=False)]
    assert any(what.startswith("the val records have sha256") and "everywhere else 0000" in what for what in whats)
    assert any("ffffffffffffffff with the versions of constraints.txt" in what for what in whats)
    assert len(whats) == 2


def test_unbalanced_answers_are_found(copy, library, monkeypatch):
    """K9 drawn with other goals: "clean" three times as often."""
    from lightning_pfl.benchmark.suite import verify as verifying

    crooked = replace(find_task("K9"), goals=("clean", "clean", "clean", "blurry", "noisy", "dark", "compressed"))
    monkeypatch.setattr(verifying, "find_task", lambda name: crooked if name.startswith("K9") else find_task(name))

    assert any("train are not balanced" in problem.what for problem in verify(copy, library, near=False))


def test_unbalanced_answers_are_found_where_examples_offer_different_choices(library, tmp_path, monkeypatch):
    """K13 drawn with other goals; B3 with the right answer always in the first place: of 16, but 4 + 4 sqrt(3) may."""
    from lightning_pfl.benchmark.suite import verify as verifying

    specs = find_tasks(["B3", "B7", "B11", "K13"])
    build(specs, library, tmp_path, sizes=Sizes(16, 16, 16), pixels=16)
    assert verify(tmp_path, library, near=False) == []

    def right_first(rng, goal, shelf):
        draft = find_task("B3").ask(rng, goal, shelf)
        return replace(draft, choices=tuple(sorted(draft.choices, key=lambda choice: choice != draft.answer)))

    crooked = {
        "K13-shape": replace(
            find_task("K13"), goals=("circle", "circle", "triangle", "square", "red", "green", "blue")
        ),
        "B3-common-action": replace(find_task("B3"), ask=right_first),
    }
    monkeypatch.setattr(verifying, "find_task", lambda name: crooked.get(name) or find_task(name))
    found = {(problem.task, problem.what) for problem in verify(tmp_path, library, near=False)}

    assert any(task == "K13-shape" and "answers of train are not balanced" in what for task, what in found)
    place = "place 0 holds the right answer of 16 test examples, but may of 10.9 at most"
    assert ("B3-common-action", place) in found


def test_a_picture_on_two_sides_and_a_lookalike_are_leaks(library, pictures, tmp_path):
    task = build_task(find_task("B4"), library, SIZES)
    same = replace(task, test=task.train[:1])
    assert any("shown on several sides" in problem.what for problem in leaks([same], near=False))

    shown = task.train[0].images[0].path
    twin = tmp_path / "twin.png"
    Image.open(shown).convert("RGB").resize((40, 40), Image.Resampling.NEAREST).save(twin)
    other = replace(task.test[0], images=(replace(task.test[0].images[0], path=twin),))
    assert leaks([replace(task, test=(other,))], near=False) == []
    assert any("looks like" in problem.what for problem in leaks([replace(task, test=(other,))]))


def test_an_empty_folder_says_what_to_do(library, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no built task\. Make one: lightning-pfl benchmark build"):
        verify(tmp_path, library)
