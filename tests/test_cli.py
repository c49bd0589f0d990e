"""The command line parses, helps and refuses."""

import pytest

from lightning_pfl import cli


def test_arguments_reach_the_command(monkeypatch):
    seen = {}
    monkeypatch.setattr(cli, "_COMMANDS", {_named("demo", seen): {"quick": "tiny"}})
    cli.main(["demo", "--quick", "--seed", "3"])
    assert seen == {"quick": True, "seed": 3}


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["dmeo"])
    assert "demo" in capsys.readouterr().err


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
