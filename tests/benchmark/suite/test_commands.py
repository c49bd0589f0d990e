"""`lightning-pfl benchmark` from the command line, on the little library."""

import pytest

from lightning_pfl import cli
from lightning_pfl.benchmark.suite import commands
from lightning_pfl.benchmark.suite import library as shelves


@pytest.fixture(autouse=True)
def little(library, monkeypatch, tmp_path):
    monkeypatch.setattr(shelves, "load_library", lambda **_: library)
    monkeypatch.setenv("LIGHTNING_PFL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")


def test_build_verify_and_show(tmp_path, capsys):
    root = tmp_path / "suite"

    cli.main(["benchmark", "build", str(root), "A5", "K10", "--smoke", "--pixels", "32", "--workers", "1"])
    cli.main(["benchmark", "verify", str(root), "--quick"])
    cli.main(["benchmark", "show", str(tmp_path / "sheet.png"), "A5", "--examples", "1", "--pixels", "32"])

    said = capsys.readouterr().out
    assert "wrote 2 tasks" in said
    assert "first tokens of options are not checked" in said
    assert "everything holds" in said
    assert (tmp_path / "sheet.png").exists()


def test_verify_ends_with_the_number_of_problems(tmp_path, capsys):
    cli.main(["benchmark", "build", str(tmp_path), "K10", "--smoke", "--pixels", "32", "--workers", "1"])
    for picture in (tmp_path / "K10-bar-chart" / "images").glob("*.png"):
        picture.unlink()

    with pytest.raises(SystemExit, match=r"\d+ problems"):
        cli.main(["benchmark", "verify", str(tmp_path), "--quick"])
    assert "pictures are missing" in capsys.readouterr().out


def test_tasks_are_listed_and_unknown_ones_named(capsys):
    cli.main(["benchmark", "tasks", "A", "U6"])
    said = capsys.readouterr().out
    assert "A12-transition" in said
    assert "U6-cloze" in said
    assert "B1-photo" not in said
    with pytest.raises(SystemExit, match=r"but is 'Q7'"):
        cli.main(["benchmark", "tasks", "Q7"])


def test_every_command_explains_itself():
    assert [command.__name__ for command in commands.COMMANDS] == ["tasks", "build", "verify", "show"]
    assert all(command.__doc__ for command in commands.COMMANDS)
