"""The demo's whole path on tiny models: the same code as on real ones, in this process."""

import dataclasses
import json

import pytest
from peft import PeftConfig
from rich.console import Console

from lightning_pfl.demo.plan import full_plan
from lightning_pfl.demo.progress import DemoProgress
from lightning_pfl.demo.report import print_report, write_report
from lightning_pfl.demo.run import run_demo
from lightning_pfl.demo.tiny import TinyMaterials, quick_plan
from lightning_pfl.federation import LocalPool


class Recorded(DemoProgress):
    def __init__(self):
        self.stages, self.counts = [], {}

    def stage(self, what):
        self.stages.append(what)

    def count(self, done, total):
        self.counts.setdefault(self.stages[-1], []).append((done, total))

    def close(self):
        pass


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    plan = dataclasses.replace(quick_plan(), rounds=2, steps=4, num_test=16, num_val=8)
    progress = Recorded()
    result = run_demo(plan, TinyMaterials(folder / "tiny"), folder, pool=LocalPool, progress=progress)
    return plan, result, folder, progress


def test_every_client_is_measured_on_every_task_under_both_methods(demo):
    plan, result, _, _ = demo
    assert [scores.method for scores in result.scores] == ["local only", "ours"]
    for scores in result.scores:
        assert set(scores.counts) == {client.id for client in plan.clients}
        for counts in scores.counts.values():
            assert set(counts) == {client.task for client in plan.clients}
            assert all(count.total == plan.num_test for count in counts.values())


def test_both_methods_take_the_same_steps_and_only_ours_sends(demo):
    plan, result, _, _ = demo
    assert len(result.strategy.relevance) == plan.rounds
    # one block of seven linears at rank 8: P and Q are 8 * 8 + 8 numbers of 4 bytes; a sketch has 16,384 a round
    adapter, sketch = 7 * (8 * 8 + 8) * 4, 16_384 * 4
    for client in plan.clients:
        assert result.strategy.traffic[client.id].up == plan.rounds * (adapter + sketch)


def test_the_report_says_where_everything_lies(demo, tmp_path):
    plan, result, _, _ = demo
    written = write_report(plan, result, tmp_path)
    assert all(path.exists() for path in written)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["scores"]["ours"]["self"] == pytest.approx(result.scores[1].self_mean())
    assert PeftConfig.from_pretrained(str(tmp_path / "adapters" / plan.clients[0].id)).peft_type == "COLORA"
    console = Console(width=100, record=True, file=open(tmp_path / "out.txt", "w"))  # noqa: SIM115
    print_report(plan, result, console)
    text = console.export_text()
    assert all(client.id in text for client in plan.clients)
    assert "chance" in text


def test_progress_names_every_stage(demo):
    _, _, _, progress = demo
    assert any("aligning" in stage for stage in progress.stages)
    assert any(stage.startswith("local only") for stage in progress.stages)
    assert any(stage.startswith("ours") for stage in progress.stages)


def test_long_stages_count_to_their_end(demo):
    _, _, _, progress = demo
    assert len(progress.counts) == 3  # features, projectors, states
    assert all(counts[-1][0] == counts[-1][1] for counts in progress.counts.values())


def test_the_full_plan_has_relatives_on_the_other_family():
    plan = full_plan()
    assert len(plan.clients) >= 6
    families = {}
    for client in plan.clients:
        families.setdefault(client.task.split("-")[0], set()).add(client.model)
    assert all(models == set(plan.models) for models in families.values())
