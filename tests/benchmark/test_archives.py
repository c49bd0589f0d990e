"""Archives are read without dpkg or npm, and never write outside their folder."""

import io
import stat
import tarfile
import zipfile

import pytest

from lightning_pfl.benchmark.archives import ArchiveError, unpack


def _link(name, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


def test_a_debian_package_gives_the_files_that_match_without_its_links(tmp_path, make_deb):
    files = {"./usr/share/a/one.png": b"1", "./usr/share/a/two.txt": b"22", "./usr/share/b/three.png": b"333"}
    make_deb(tmp_path / "p.deb", files, extra=[_link("./usr/share/a/link.png", "/etc/passwd")])

    count = unpack(tmp_path / "p.deb", tmp_path / "out", members=["usr/share/a/*.png"])

    found = {
        path.relative_to(tmp_path / "out").as_posix(): path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert count == 1
    assert found == {"usr/share/a/one.png": b"1"}


def test_a_gzipped_debian_package_is_read_as_well(tmp_path, make_deb):
    make_deb(tmp_path / "p.deb", {"./x": b"odd"}, mode="w:gz", suffix="gz")

    assert unpack(tmp_path / "p.deb", tmp_path / "out") == 1
    assert (tmp_path / "out/x").read_bytes() == b"odd"


def test_an_npm_tarball_and_a_wheel_are_unpacked(tmp_path, make_tgz, make_wheel):
    make_tgz(tmp_path / "p.tgz", {"package/a.png": b"a"})
    wheel, _ = make_wheel(tmp_path, "p", "1.0", {"p/b.bin": b"b"})

    assert unpack(tmp_path / "p.tgz", tmp_path / "npm") == 1
    assert unpack(wheel, tmp_path / "wheel", members=["*.bin"]) == 1
    assert (tmp_path / "npm/package/a.png").read_bytes() == b"a"
    assert (tmp_path / "wheel/p/b.bin").read_bytes() == b"b"


@pytest.mark.parametrize("name", ["../evil", "x/../../evil", "/evil", "//evil", "..\\evil", "C:evil"])
def test_a_member_outside_its_folder_is_refused(tmp_path, make_tgz, name):
    make_tgz(tmp_path / "p.tgz", {name: b"evil"})
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as wheel:
        wheel.writestr(name, b"evil")

    for archive in ("p.tgz", "p.whl"):
        with pytest.raises(ArchiveError, match="outside its folder"):
            unpack(tmp_path / archive, tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.deb", b"not an archive", "must start with"),
        ("p.deb", b"!<arch>\n" + b"x" * 30, "damaged ar header"),
        ("p.deb", b"!<arch>\n", "no data.tar"),
        ("p.tgz", b"not gzip", "cannot be read"),
        ("p.whl", b"not zip", "cannot be read"),
        ("p.rar", b"", "must end in"),
    ],
)
def test_a_damaged_or_unknown_archive_is_an_error_that_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ArchiveError, match=message) as caught:
        unpack(tmp_path / name, tmp_path / "out")
    assert name in str(caught.value)


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path, make_tgz):
    make_tgz(tmp_path / "p.tgz", {"package/a.png": b"a"})

    with pytest.raises(ArchiveError, match=r"no file that matches \['\*.svg'\]"):
        unpack(tmp_path / "p.tgz", tmp_path / "out", members=["*.svg"])


def test_a_zstd_package_is_read_or_says_what_to_install(tmp_path, make_deb, monkeypatch):
    make_deb(tmp_path / "p.deb", {"./x": b"odd"}, suffix="zst")  # holds xz bytes: no decoder may take them
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr("importlib.import_module", _no_module)

    with pytest.raises(ArchiveError, match="pip install zstandard"):
        unpack(tmp_path / "p.deb", tmp_path / "out")


def _no_module(name):
    raise ImportError(name)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_left_out_and_nothing_is_written_through_them(tmp_path, kind):
    """A link to a folder outside comes first, then a file below it."""
    (tmp_path / "outside").mkdir()
    link = _link("way", str(tmp_path / "outside"))
    link.type = kind
    with tarfile.open(tmp_path / "p.tgz", "w:gz") as archive:
        archive.addfile(link)
        member = tarfile.TarInfo("way/evil")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))

    assert unpack(tmp_path / "p.tgz", tmp_path / "out") == 1

    assert not list((tmp_path / "outside").iterdir())
    assert (tmp_path / "out" / "way").is_dir()
    assert not (tmp_path / "out" / "way").is_symlink()
    assert (tmp_path / "out" / "way" / "evil").is_file()


def test_a_link_in_a_wheel_is_only_its_text(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as wheel:
        link = zipfile.ZipInfo("way")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        wheel.writestr(link, "/etc")

    unpack(tmp_path / "p.whl", tmp_path / "out")

    assert not (tmp_path / "out" / "way").is_symlink()
    assert (tmp_path / "out" / "way").read_text() == "/etc"


@pytest.mark.parametrize("size", [b"-5        ", b"x         ", b"          "])
def test_a_debian_package_with_a_size_that_is_none_is_refused(tmp_path, size):
    header = b"debian-binary   " + b"0           0     0     100644  " + size + b"`\n"
    (tmp_path / "p.deb").write_bytes(b"!<arch>\n" + header + b"2.0\n")
    with pytest.raises(ArchiveError, match="damaged ar header"):
        unpack(tmp_path / "p.deb", tmp_path / "out")
