"""The command line parses, helps and refuses."""

import pytest

from lightning_pfl import cli
from tests.comparison.recorded import record


def test_arguments_reach_the_command(monkeypatch):
    seen = {}
    monkeypatch.setattr(cli, "_COMMANDS", {_named("demo", seen): {"quick": "tiny"}})
    cli.main(["demo", "--quick", "--seed", "3"])
    assert seen == {"quick": True, "seed": 3}


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["dmeo"])
    assert "demo" in capsys.readouterr().err


def test_a_comparison_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"lightning-pfl benchmark: .*none\.yaml"):
        cli.main(["benchmark", "run", str(tmp_path / "none.yaml")])


def test_methods_that_a_comparison_does_not_have_are_refused(tmp_path):
    (tmp_path / "it.yaml").write_text(
        "{title: x, protocol: mini, scenario: static, assignment: [llama], seeds: [0], "
        "methods: {local: {make: lightning_pfl.methods.local_only}}}"
    )
    with pytest.raises(SystemExit, match="no method 'FedAvg'"):
        cli.main(["benchmark", "run", str(tmp_path / "it.yaml"), "--methods", "FedAvg"])


def test_a_report_of_recorded_runs_is_written(tmp_path):
    lines = [record("local", seed, (4, 6), (2, 2), role="local").line() for seed in (0, 1)]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines))
    cli.main(["benchmark", "report", str(tmp_path / "runs.jsonl"), "--output", str(tmp_path / "out")])
    assert "By hand" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "report.md").exists()


def _named(name, seen):
    def command(*, quick: bool = False, seed: int = 0) -> None:
        """Do it.

        Args:
            quick: fast.
            seed: of everything.
        """
        seen.update(quick=quick, seed=seed)

    command.__name__ = name
    return command
