"""Registries come from the machine's configuration and from nowhere else."""

import pytest

from lightning_pfl.benchmark.registries import RegistryNotConfiguredError, debian_mirrors, npm_registry


def test_npmrc_names_a_registry_a_scope_and_a_token(tmp_path):
    (tmp_path / ".npmrc").write_text(
        "; a comment\nregistry=http://one.test/npm/\n@art:registry = http://two.test/\n//two.test/:_authToken=${SECRET}\n"
    )
    env = {"HOME": str(tmp_path), "SECRET": "abc"}

    plain, scoped = npm_registry("left-pad", environ=env), npm_registry("@art/emoji", environ=env)

    assert (plain.url, plain.token) == ("http://one.test/npm", None)
    assert (scoped.url, scoped.token) == ("http://two.test", "abc")


def test_the_environment_outranks_npmrc(tmp_path):
    (tmp_path / ".npmrc").write_text("registry=http://one.test/\n")
    env = {"HOME": str(tmp_path), "npm_config_registry": "http://three.test/"}

    assert npm_registry("left-pad", environ=env).url == "http://three.test"


def test_without_an_npm_registry_the_error_says_how_to_name_one(tmp_path):
    with pytest.raises(RegistryNotConfiguredError, match=r"left-pad comes from one\. Set npm_config_registry="):
        npm_registry("left-pad", environ={"HOME": str(tmp_path)})


def test_apt_sources_of_both_formats_give_their_mirrors_in_order(tmp_path):
    (tmp_path / "sources.list").write_text(
        "# deb http://comment.test/debian x main\ndeb [signed-by=/k arch=amd64] http://one.test/debian/ stable main\n"
        "deb-src http://source.test/debian stable main\ndeb cdrom:[Debian]/ stable main\n"
    )
    folder = tmp_path / "sources.list.d"
    folder.mkdir()
    (folder / "a.sources").write_text(
        "Types: deb\n# a comment between\nURIs: http://two.test/debian\n  http://three.test/debian\nSuites: stable\n\n"
        "Types: deb\nURIs: http://off.test/debian\nEnabled: no\n\nTypes: deb-src\nURIs: http://src.test/debian\n"
    )
    (folder / "b.list").write_text("deb http://one.test/debian stable-updates main\n")
    (folder / "c.disabled").write_text("deb http://stale.test/debian stable main\n")

    mirrors = debian_mirrors(environ={}, etc=tmp_path)

    assert mirrors == ("http://one.test/debian", "http://two.test/debian", "http://three.test/debian")


def test_the_environment_outranks_apt_sources(tmp_path):
    (tmp_path / "sources.list").write_text("deb http://one.test/debian stable main\n")

    assert debian_mirrors(environ={"LIGHTNING_PFL_DEBIAN_MIRROR": "file:///mirror/"}, etc=tmp_path) == (
        "file:///mirror",
    )


def test_without_a_mirror_the_error_says_how_to_name_one(tmp_path):
    with pytest.raises(RegistryNotConfiguredError, match="Set LIGHTNING_PFL_DEBIAN_MIRROR="):
        debian_mirrors(environ={}, etc=tmp_path)
