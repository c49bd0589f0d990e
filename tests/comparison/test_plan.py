"""A comparison as its file says it."""

import dataclasses
from pathlib import Path

import pytest

from lightning_pfl import CoLoRA
from lightning_pfl.adapters import FixedGate
from lightning_pfl.comparison import commands, tuning
from lightning_pfl.comparison.making import make_method
from lightning_pfl.comparison.plan import MethodPlan, read_comparison, read_protocol
from lightning_pfl.comparison.tuning import settings_of, trials_of, write_chosen
from lightning_pfl.methods import ditto, ours

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TEXT = """
title: Test
protocol: mini
scenario: dynamic
assignment: [llama, gemma]
seeds: [0, 1]
tuned: tuned.yaml
tune: {lr_pq: [0.01, 0.02]}
tune_budget: 3
methods:
  local: {make: lightning_pfl.methods.local_only, role: local, seeds: 1}
  ours:
    make: lightning_pfl.methods.frozen_mixture
    arguments:
      weights: {class_path: lightning_pfl.Softmax, init_args: {temperature: 0.25}}
      gate: {class_path: lightning_pfl.adapters.FixedGate, init_args: {value: 0.25}}
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "it.yaml").write_text(TEXT)
    return tmp_path / "it.yaml"


@pytest.mark.parametrize("name", ["mini", "small", "suite", "full"])
def test_packaged_protocols_end_with_an_evaluation(name):
    protocol = read_protocol(name)
    assert protocol.self_at[-1] == protocol.others_at[-1] == protocol.num_rounds


def test_runs_go_seed_by_seed_and_some_methods_have_fewer(path):
    assert read_comparison(path).runs() == [("local", 0), ("ours", 0), ("ours", 1)]


def test_arguments_become_objects(path):
    plan = read_comparison(path).method("ours")
    method = make_method(plan, {"adapters": CoLoRA})
    assert method.name == "frozen mixture"
    assert method.callbacks[0].config.gate == FixedGate(value=0.25)
    assert plan.described()["arguments"]["weights"]["class_path"] == "lightning_pfl.Softmax"


def test_tuned_settings_are_read_where_there_are_some(path):
    assert read_comparison(path).method("ours").lr_pq is None
    write_chosen({"ours": {"lr_pq": 0.02}, "gone": {"lr": 1}}, path.parent / "tuned.yaml")
    write_chosen({"local": {"lr_pq": 0.01}}, path.parent / "tuned.yaml")  # by another call, for another method
    plan = read_comparison(path).method("ours")
    assert plan.lr_pq == 0.02
    assert "weights" in plan.arguments


def test_the_key_changes_with_what_decides_a_result_and_with_nothing_else(path):
    one = read_comparison(path)
    again = dataclasses.replace(one, title="Another", seeds=(7,), methods={"ours": one.methods["ours"]})
    other = dataclasses.replace(one, scenario="static")
    slower = dataclasses.replace(one, tuned={"ours": {"lr_pq": 0.5}})
    assert one.key("ours") == again.key("ours")
    shared = dataclasses.replace(one, aligned_with=("gemma",))
    assert len({one.key("ours"), one.key("local"), other.key("ours"), slower.key("ours"), shared.key("ours")}) == 5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("protocol: mini", "protocol: tiny", r"one of \['full', 'mini', 'small', 'suite'\]"),
        ("[llama, gemma]", "[llama, qwen]", "qwen"),
        ("[llama, gemma]", "[llama]\naligned_with: [qwen]", "`aligned_with`.*qwen"),
        ("scenario: dynamic", "scenario: sometimes", "sometimes"),
        ("methods.frozen_mixture", "methods.theirs", "theirs"),
        ("local:", "OURS:", "share a folder"),
        ("title: Test", "titel: Test", "titel"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(path, old, new, message):
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_comparison(path)


def test_arguments_that_a_method_does_not_take_are_refused():
    with pytest.raises(ValueError, match="ditto"):
        make_method(MethodPlan(ditto, {"strenght": 1.0}), {"adapters": CoLoRA})
    with pytest.raises(ValueError, match="ours"):
        make_method(MethodPlan(ours, {"weights": 3}), {"adapters": CoLoRA})


def test_every_method_has_the_same_budget(path):
    trials = trials_of(read_comparison(path))
    assert [one.method for one in trials] == ["local", "local", "ours", "ours"]
    wide = MethodPlan(ditto, tune={"strength": [0.1, 0.2, 0.5, 1.0]})
    found = settings_of("Ditto", wide, {"lr_pq": [0.01, 0.02]}, budget=3)
    assert len(found) == 3
    assert found == settings_of("Ditto", wide, {"lr_pq": [0.01, 0.02]}, budget=3)


def test_some_methods_are_tuned_again_beside_what_was_chosen_for_others(path, monkeypatch):
    write_chosen({"ours": {"lr_pq": 0.02}}, path.parent / "tuned.yaml")
    asked = []

    def choose(comparison, folder, **_):
        asked.append((list(comparison.methods), dict(comparison.tuned)))
        return {"local": {"lr_pq": 0.5}}

    monkeypatch.setattr(tuning, "tune", choose)
    commands.tune(path, methods=["local"])
    assert asked == [(["local"], {})]
    assert read_comparison(path).tuned == {"ours": {"lr_pq": 0.02}, "local": {"lr_pq": 0.5}}


COMPARISONS = sorted(path for path in RESULTS.rglob("*.yaml") if "\nmethods:" in path.read_text())


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_comparisons_of_the_repository_can_be_read_and_their_methods_be_made(path):
    given = {"adapters": CoLoRA, "outputs": len, "batches": len, "logits": len, "tasks": {}, "relations": {}}
    comparison = read_comparison(path)
    roles = [comparison.method(name).role for name in comparison.methods]
    assert roles.count("local") == 1 >= roles.count("control")
    assert "ours" in roles
    for name in comparison.methods:
        assert make_method(comparison.method(name), given).passes >= 1
        for settings in settings_of(name, comparison.methods[name], comparison.tune, comparison.tune_budget):
            make_method(comparison.methods[name].with_settings(settings), given)
