"""What a task's files must be is kept as data, for the sizes that people build."""

from __future__ import annotations

import hashlib

import pytest
from PIL import Image

from lightning_pfl.benchmark.suite import digests as kept
from lightning_pfl.benchmark.suite.build import build, views_of
from lightning_pfl.benchmark.suite.catalogue import find_task, find_tasks
from lightning_pfl.benchmark.suite.digests import (
    TaskDigests,
    expected_digests,
    pixels_of,
    record_digests,
    task_digests,
    written_digests,
)
from lightning_pfl.benchmark.suite.recipes import SMOKE, STANDARD, SUITE, Sizes, build_task
from lightning_pfl.benchmark.suite.rendering import picture_path


def test_every_task_has_digests_and_no_two_are_alike():
    found = [expected_digests(spec.name, STANDARD, 128) for spec in find_tasks([])]

    assert None not in found
    records = [digest for digests in found for digest in digests.records.values()]
    assert len(set(records)) == len(records) == 138
    pictures = [digests.pictures for digests in found if digests.pictures is not None]
    assert len(set(pictures)) == len(pictures)


def test_other_sizes_and_resolutions_have_none():
    assert expected_digests("A2-edit-made", SMOKE, 128) is None
    assert expected_digests("A2-edit-made", STANDARD, 64) is None
    assert expected_digests("Z9-none", STANDARD, 128) is None


def test_the_list_belongs_to_this_suite():
    text = (kept.resources.files("lightning_pfl.benchmark.suite") / "digests.txt").read_text()

    assert text.startswith(f"# {SUITE} at 128 pixels")


def test_digests_are_of_decoded_pixels_and_of_their_order(tmp_path):
    """By hand: one red and one blue pixel, as PNG files of different compression."""
    for name, colour, level in (("a", "red", 0), ("b", "red", 9), ("c", "blue", 9)):
        Image.new("RGB", (1, 1), colour).save(tmp_path / f"{name}.png", compress_level=level)
    a, b, c = (pixels_of(tmp_path / f"{name}.png") for name in "abc")
    records = {"train": "1" * 64}

    assert (a, c) == (b"\xff\x00\x00", b"\x00\x00\xff")
    assert task_digests(records, [a, c]) == TaskDigests(
        {"train": "1" * 16}, hashlib.sha256(b"\xff\x00\x00\x00\x00\xff").hexdigest()[:16]
    )
    assert task_digests(records, [a, c]) == task_digests(records, [b, c]) != task_digests(records, [c, a])


def test_what_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        pixels_of(tmp_path / "none.png")
    Image.effect_noise((30, 30), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    with pytest.raises(ValueError, match="truncated"):
        pixels_of(tmp_path / "cut.png")


def test_the_written_list_is_read_back(monkeypatch, tmp_path):
    digests = TaskDigests({"train": "a" * 16, "val": "b" * 16, "test": "c" * 16}, "d" * 16)
    unseen = TaskDigests(digests.records, None)
    (tmp_path / "digests.txt").write_text(written_digests({"A1-wear-count": digests, "A9-motion": unseen}))
    monkeypatch.setattr(kept.resources, "files", lambda package: tmp_path)
    kept._kept.cache_clear()
    try:
        assert expected_digests("A1-wear-count", STANDARD, 128) == digests
        assert expected_digests("A9-motion", STANDARD, 128) == unseen
        assert expected_digests("A2-edit-made", STANDARD, 128) is None
    finally:
        kept._kept.cache_clear()


def test_two_builds_have_the_same_digests(library, tmp_path):
    """Into two folders, out of order."""
    sizes, specs = Sizes(6, 3, 3), find_tasks(["A9", "K14"])
    found = []
    for folder in ("one", "two"):
        build(specs if folder == "one" else specs[::-1], library, tmp_path / folder, sizes=sizes, pixels=32)
        for spec in specs:
            views = views_of(build_task(find_task(spec.name), library, sizes))
            images = tmp_path / folder / spec.name / "images"
            contents = [pixels_of(picture_path(images, view, 32)) for view in views]
            found.append(task_digests(record_digests(tmp_path / folder, spec.name), contents))

    assert found[:2] == found[2:]
