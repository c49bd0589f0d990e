"""A Qt resource file made by hand is read back."""

import struct
import zlib

import pytest

from lightning_pfl.benchmark.rcc import read_rcc


def _rcc(version):
    """Root folder with `a.txt` (plain) and folder `sub` with `b.txt` (zlib)."""
    names, offsets = b"", {}
    for name in ("a.txt", "sub", "b.txt"):
        offsets[name] = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    packed = struct.pack(">I", 5) + zlib.compress(b"hello")
    data = struct.pack(">I", 3) + b"abc" + struct.pack(">I", len(packed)) + packed
    stamp = b"\0" * 8 if version >= 2 else b""
    nodes = [
        struct.pack(">IHII", 0, 2, 2, 1) + stamp,
        struct.pack(">IHHHI", offsets["a.txt"], 0, 0, 0, 0) + stamp,
        struct.pack(">IHII", offsets["sub"], 2, 1, 3) + stamp,
        struct.pack(">IHHHI", offsets["b.txt"], 1, 0, 0, 7) + stamp,
    ]
    tree = b"".join(nodes)
    start = 20
    header = b"qres" + struct.pack(">4I", version, start, start + len(tree), start + len(tree) + len(data))
    return header + tree + data + names


@pytest.mark.parametrize("version", [1, 2])
def test_plain_and_packed_files_are_read_with_their_paths(tmp_path, version):
    (tmp_path / "x.rcc").write_bytes(_rcc(version))

    assert dict(read_rcc(tmp_path / "x.rcc")) == {"a.txt": b"abc", "sub/b.txt": b"hello"}


def test_another_file_is_refused(tmp_path):
    (tmp_path / "x.rcc").write_bytes(b"PNG")

    with pytest.raises(ValueError, match="must start with 'qres'"):
        list(read_rcc(tmp_path / "x.rcc"))


def test_a_tree_that_bites_its_tail_is_refused(tmp_path):
    """The root's first child is the root: a reader that trusts it never ends."""
    blob = bytearray(_rcc(1))
    struct.pack_into(">I", blob, 20 + 10, 0)
    (tmp_path / "x.rcc").write_bytes(blob)
    with pytest.raises(ValueError, match="lies in two folders"):
        list(read_rcc(tmp_path / "x.rcc"))


def test_a_name_that_climbs_is_refused(tmp_path):
    blob = _rcc(1).replace("a.txt".encode("utf-16-be"), "../ab".encode("utf-16-be"))
    (tmp_path / "x.rcc").write_bytes(blob)
    with pytest.raises(ValueError, match="no name of one"):
        list(read_rcc(tmp_path / "x.rcc"))


@pytest.mark.parametrize("length", range(4, 140, 7))
def test_a_file_that_was_cut_is_refused(tmp_path, length):
    (tmp_path / "x.rcc").write_bytes(_rcc(1)[:length])
    with pytest.raises(ValueError, match=r"damaged|no name|must start"):
        list(read_rcc(tmp_path / "x.rcc"))
