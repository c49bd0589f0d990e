"""Published scenario files load as they are; what does not fit is named."""

import json

import pytest
from PIL import Image

from lightning_pfl.benchmark.records import UnknownTaskError, records_path
from lightning_pfl.benchmark.scenarios import (
    Scenario,
    ScenarioClient,
    ScenarioError,
    Slot,
    load_tasks,
    read_scenario,
    write_scenario,
)
from lightning_pfl.data import DynamicStream
from lightning_pfl.metrics import PersonalizationScores

# the form of scenarios/DRAKE_hetero_llava_llama_1B_3B.json, its sixth and first client
PUBLISHED = """[
  {"client_id": 6, "datasets": [
     {"dataset": "WCVQA", "subset_id": 0, "type": "multi-choice"},
     {"dataset": "iconqa", "subset_id": 2, "type": "open-ended", "metric": "F1"},
     {"dataset": "dummy", "subset_id": 0, "type": "multi-choice"},
     {"dataset": "SEED-Bench-2", "subset_id": 1, "type": "multi-choice"}],
   "model_id": "thkim0305/llama3.2_3B_vl"},
  {"client_id": 0, "datasets": [
     {"dataset": "dummy"},
     {"dataset": "WCVQA", "subset_id": 0, "type": "multi-choice"}],
   "model_id": "thkim0305/llama3.2_1B_vl"}
]"""


@pytest.fixture
def published(tmp_path):
    (tmp_path / "DRAKE.json").write_text(PUBLISHED)
    return tmp_path / "DRAKE.json"


def fill(root, dataset, subset, count=5, *, answer="cat", question="<image> What? Choice list:[cat, dog]"):
    folder = root / dataset / "images"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "a.png").open("wb") as stream:
        Image.new("RGB", (4, 4), (255, 0, 0)).save(stream, format="png")
    record = {
        "image": f"dataset/{dataset}/images/a.png",
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }
    for split in ("train", "test"):
        path = records_path(root, dataset, subset, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([record] * count))


def test_a_published_file_loads_unchanged(published):
    scenario = read_scenario(published)

    assert scenario.models == {"client-6": "thkim0305/llama3.2_3B_vl", "client-0": "thkim0305/llama3.2_1B_vl"}
    assert scenario.tasks["client-6"] == ("WCVQA-0", "iconqa-2", "SEED-Bench-2-1")
    open_slot = scenario.clients[0].slots[1]
    assert (open_slot.is_open, open_slot.metric) == (True, "F1")
    assert [slot.is_idle for slot in scenario.clients[0].slots] == [False, False, True, False]
    assert [slot.task for slot in scenario.slots] == ["WCVQA-0", "iconqa-2", "SEED-Bench-2-1"]


def test_what_is_written_is_read_back(published, tmp_path):
    scenario = read_scenario(published)
    write_scenario(scenario, tmp_path / "new" / "again.json")

    assert read_scenario(tmp_path / "new" / "again.json") == scenario


def test_a_scenario_is_loaded_streamed_and_scored(published, tmp_path):
    """Each distinct task once; open questions are not read as choices; idle slots are empty stretches of a stream."""
    scenario, root = read_scenario(published), tmp_path / "dataset"
    fill(root, "WCVQA", 0, 10)
    fill(root, "SEED-Bench-2", 1, 5)
    fill(root, "iconqa", 2, 5, answer="3", question="<image> How many? Choice list:[not, one]")
    tasks = load_tasks(scenario, root)

    assert list(tasks) == ["WCVQA-0", "iconqa-2", "SEED-Bench-2-1"]
    assert tasks["iconqa-2"].test[0].choices == ()
    sizes = scenario.train_sizes(tasks)
    assert sizes == {"client-6": (8, 4, 0, 4), "client-0": (0, 8)}
    assert DynamicStream(sizes["client-6"], 2).idle_rounds == (4, 5)
    scores = PersonalizationScores(scenario.tasks, families={name: task.family for name, task in tasks.items()})
    assert scores.owned.tolist() == [[True, True, True], [True, False, False]]


def test_a_scenario_of_nine_clients_with_subsets_of_seven_data_sets_is_loaded(tmp_path):
    """As HFLB: multi-choice alone, GQA dealt to three clients; a task's family is its data set."""
    names = ["GQA"] * 3 + ["Abstract_VQA", "SNLI-VE", "COCO-QA", "NLVR2", "VizWiz", "AQUA"]
    firsts = [0, 4, 8, 0, 0, 0, 0, 0, 0]
    entries = [
        {
            "client_id": number,
            "datasets": [{"dataset": name, "subset_id": first + i, "type": "multi-choice"} for i in range(4)],
            "model_id": f"thkim0305/llama3.2_{'1B' if number in (0, 1, 5) else '3B'}_vl",
        }
        for number, (name, first) in enumerate(zip(names, firsts, strict=True))
    ]
    path, root = tmp_path / "HFLB_hetero_llava_llama_1B_3B.json", tmp_path / "dataset"
    path.write_text(json.dumps(entries))
    for entry in entries:
        for slot in entry["datasets"]:
            fill(root, slot["dataset"], slot["subset_id"])
    scenario = read_scenario(path)
    tasks = load_tasks(scenario, root)

    assert len(tasks) == 36
    assert scenario.tasks["client-2"] == ("GQA-8", "GQA-9", "GQA-10", "GQA-11")
    assert scenario.tasks["client-4"] == ("SNLI-VE-0", "SNLI-VE-1", "SNLI-VE-2", "SNLI-VE-3")
    assert [task.family for task in tasks.values()] == [name for name in names for _ in range(4)]
    assert {task.test[0].choices for task in tasks.values()} == {("cat", "dog")}
    assert [name for name, model in scenario.models.items() if "1B" in model] == ["client-0", "client-1", "client-5"]


def test_a_scenario_that_names_missing_tasks_lists_them_all_with_their_clients(published, tmp_path):
    root = tmp_path / "dataset"
    fill(root, "WCVQA", 0)
    fill(root, "iconqa", 1)

    with pytest.raises(UnknownTaskError) as caught:
        load_tasks(read_scenario(published), root)
    message = str(caught.value)
    assert "iconqa-2 of client-6" in message
    assert "Of iconqa there are the train subsets ['1']." in message
    assert "has no data set SEED-Bench-2; it has ['WCVQA', 'iconqa']" in message
    assert "WCVQA-0" not in message
    with pytest.raises(UnknownTaskError, match="There is no folder"):
        load_tasks(read_scenario(published), tmp_path / "nowhere")


def test_models_can_be_assigned_anew(published):
    scenario = read_scenario(published).with_models({"client-6": "a", "client-0": "b"})

    assert scenario.models == {"client-6": "a", "client-0": "b"}
    with pytest.raises(ValueError, match=r"none for \['client-0'\]"):
        scenario.with_models({"client-6": "a"})


def test_a_client_with_idle_slots_only_has_no_score_of_its_own():
    scenario = Scenario((ScenarioClient(3, "m", (Slot("dummy"),)),))

    assert scenario.tasks == {"client-3": ()}
    with pytest.raises(ValueError, match="client `client-3` a list of at least one task"):
        PersonalizationScores(scenario.tasks)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", r"must hold a list of clients, but holds \{\}"),
        ("[]", "must hold a list of clients"),
        ("[3]", "client 0 must be an object, but is 3"),
        ('[{"client_id": "0", "model_id": "m", "datasets": [{"dataset": "X", "subset_id": 0}]}]', "`client_id` as int"),
        ('[{"client_id": 0, "datasets": [{"dataset": "X", "subset_id": 0}]}]', "`model_id` as str, but has null"),
        ('[{"client_id": 0, "model_id": "m", "datasets": []}]', "at least one data set"),
        ('[{"client_id": 0, "model_id": "m", "datasets": [{"dataset": "X"}]}]', "slot 0 must have `subset_id` as int"),
        ('[{"client_id": 0, "model_id": "m", "datasets": ["X"]}]', "slot 0 must be an object"),
        (json.dumps([{"client_id": 1, "model_id": "m", "datasets": [{"dataset": "dummy"}]}] * 2), r"but \[1\] occur"),
    ],
)
def test_a_mistake_names_the_file_and_the_place(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)

    with pytest.raises(ScenarioError, match=message) as caught:
        read_scenario(path)
    assert str(caught.value).startswith(str(path))
