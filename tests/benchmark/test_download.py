"""A download is whole and right, or not there; what came before a break is kept."""

import hashlib
import urllib.error

import pytest

from lightning_pfl.benchmark.download import DigestError, download

CONTENT = bytes(range(256)) * 4000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def url(registry):
    (registry.root / "file.bin").write_bytes(CONTENT)
    return registry.url + "/file.bin"


def test_a_broken_download_is_continued_where_it_stopped(registry, url, tmp_path):
    registry.break_after = 300_000

    download(url, tmp_path / "file.bin", sha256=DIGEST)

    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert [asked for _, asked, _ in registry.requests] == [None, "bytes=300000-"]
    assert not (tmp_path / "file.bin.part").exists()


def test_an_answer_in_chunks_that_breaks_off_is_taken_up_again(registry, url, tmp_path):
    """Python's http.client calls this IncompleteRead, which is no OSError."""
    registry.break_after, registry.chunked = 600_000, True

    download(url, tmp_path / "file.bin", sha256=DIGEST)

    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert len(registry.requests) == 2


def test_a_download_that_keeps_breaking_off_keeps_what_came(registry, url, tmp_path):
    registry.break_after = 300_000
    with pytest.raises(ConnectionError, match=f"300000 of {len(CONTENT)} bytes came"):
        download(url, tmp_path / "file.bin", sha256=DIGEST, attempts=1)

    assert (tmp_path / "file.bin.part").stat().st_size == 300_000
    assert not (tmp_path / "file.bin").exists()
    download(url, tmp_path / "file.bin", sha256=DIGEST)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_partial_file_of_an_earlier_run_is_continued(registry, url, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])

    download(url, tmp_path / "file.bin", sha256=DIGEST)

    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert registry.requests[0][1] == "bytes=1000-"


def test_a_server_without_ranges_sends_the_whole_file_again(registry, url, tmp_path):
    registry.ranges = False
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    seen = []

    download(url, tmp_path / "file.bin", sha256=DIGEST, report=lambda *report: seen.append(report))

    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert seen[-1] == ("file.bin", len(CONTENT), len(CONTENT))


def test_a_partial_file_that_is_too_long_is_started_over(registry, url, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")

    download(url, tmp_path / "file.bin", sha256=DIGEST)

    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_other_bytes_than_the_pinned_ones_are_not_kept(url, tmp_path):
    with pytest.raises(DigestError, match=f"must have sha256 {'0' * 64}, but has {DIGEST}"):
        download(url, tmp_path / "file.bin", sha256="0" * 64)
    assert not list(tmp_path.glob("file.bin*"))


def test_a_missing_file_fails_at_once(registry, tmp_path):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        download(registry.url + "/none", tmp_path / "none", sha256=DIGEST)
    assert len(registry.requests) == 1


def test_progress_ends_at_the_size_of_the_file(url, tmp_path):
    seen = []

    download(url, tmp_path / "file.bin", sha256=DIGEST, report=lambda *report: seen.append(report))

    assert seen[-1] == ("file.bin", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_a_file_address_is_copied(tmp_path):
    (tmp_path / "source.bin").write_bytes(CONTENT)
    (tmp_path / "target.bin.part").write_bytes(b"stale")

    download((tmp_path / "source.bin").as_uri(), tmp_path / "target.bin", sha256=DIGEST)

    assert (tmp_path / "target.bin").read_bytes() == CONTENT
