"""The guide's own code runs, from a scenario file and records to the report."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from lightning_pfl import LocalPool
from lightning_pfl.benchmark.records import records_path
from tests.benchmark import tiny_llava

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "published-data.md"


def publish(folder, model):
    """Two clients: colours and counting (an open question), and an idle slot before colours."""
    slots = [{"dataset": "Colours", "subset_id": 0, "type": "multi-choice"}]
    counting = {"dataset": "Counting", "subset_id": 1, "type": "open-ended", "metric": "F1"}
    entries = [
        {"client_id": 0, "datasets": [*slots, counting], "model_id": model},
        {"client_id": 1, "datasets": [{"dataset": "dummy"}, *slots], "model_id": model},
    ]
    (folder / "scenarios").mkdir()
    (folder / "scenarios" / "DRAKE_hetero_llava_llama_1B_3B.json").write_text(json.dumps(entries))
    root = folder / "dataset"
    for dataset, subset, question, answers in (
        ("Colours", 0, "<image> What colour ? Choice list:[red, blue]", {"red": (200, 0, 0), "blue": (0, 0, 200)}),
        ("Counting", 1, "<image><image> What ?", {"one": (0, 0, 0), "two": (255, 255, 255)}),
    ):
        (root / dataset / "images").mkdir(parents=True)
        for answer, colour in answers.items():
            Image.new("RGB", (20, 10), colour).save(root / dataset / "images" / f"{answer}.png")
        records = [
            {
                "image": [f"dataset/{dataset}/images/{answer}.png"] * question.count("<image>"),
                "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
            }
            for answer in answers
        ]
        for split in ("train", "test"):
            path = records_path(root, dataset, subset, split)
            path.parent.mkdir()
            path.write_text(json.dumps(records * 3))


@pytest.mark.filterwarnings("ignore")
def test_the_guide_runs_from_the_files_to_the_report(tmp_path, monkeypatch):
    publish(tmp_path, tiny_llava.save(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    known = {"ROUNDS_PER_TASK": 1, "NUM_STEPS": 2, "RANK": 2, "NUM_BLOCKS": 1, "POOL": LocalPool()}
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf8"), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), known)

    rows = {(row["client"], row["score"]): float(row["value"]) for row in csv.DictReader(io.StringIO(known["report"]))}
    assert rows["client-1", "idle_rounds"] == 1
    assert rows["client-0", "idle_rounds"] == 0
    assert 0 <= rows["*", "self_last"] <= 1
    assert 0 <= rows["client-1", "others_unseen_last"] <= 1
    numbers = list(csv.DictReader(io.StringIO(known["every_number"])))
    assert [(row["client"], row["task"], row["relation"]) for row in numbers] == [
        ("client-0", "Colours-0", "own"),
        ("client-0", "Counting-1", "own"),
        ("client-1", "Colours-0", "own"),
        ("client-1", "Counting-1", "unseen"),
    ]

    writer = type("Says", (known["Writer"],), {"write": lambda self, batch: batch["texts"]})()
    batch = {"texts": ["It is red.", "no idea"], "choices": [["red", "blue"]] * 2, "answers": ["red", "blue"]}
    trainer = known["L"].Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    assert trainer.test(writer, DataLoader([batch], batch_size=None), verbose=False) == [{"test_written": 0.5}]
