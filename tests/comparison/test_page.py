"""A report as files: one page that needs nothing else, and Markdown with the same numbers."""

import re
from html.parser import HTMLParser

import pytest

from lightning_pfl.comparison import commands
from lightning_pfl.comparison.newcomers import Arrival
from lightning_pfl.comparison.record import read_records, record_path
from lightning_pfl.comparison.report.page import write_report
from tests.comparison.recorded import record

WEIGHTS = [[0.0, 1.0], [1.0, 0.0]]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    records = [
        record("local", 0, (4, 6), (2, 2), role="local"),
        record("local", 1, (6, 6), (2, 4), role="local"),
        record("<ours>", 0, (7, 7), (4, 4), role="ours", weights=WEIGHTS, similarity=WEIGHTS),
        record("<ours>", 1, (7, 9), (4, 4), role="ours", weights=WEIGHTS, similarity=WEIGHTS),
    ]
    page, tables = write_report(records, tmp_path_factory.mktemp("report"))
    return page.read_text("utf8"), tables.read_text("utf8")


def test_the_page_needs_nothing_else(written):
    page, _ = written
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", page)
    assert "@import" not in page
    assert "<script" not in page


def test_every_element_that_is_opened_is_closed(written):
    open_elements = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "br", "link"):
                open_elements.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert open_elements.pop() == tag

    Checker().feed(written[0])
    assert open_elements == []


def test_newcomers_have_a_picture_and_their_numbers(tmp_path):
    """Six of ten before any step, nine after eight."""
    came = [Arrival("mice", "llama", 0.25, [0, 8], [6, 9], 10, {"a": 1.0})]
    page, tables = write_report([record("ours", 0, (7, 7), (4, 4), role="ours", newcomers=came)], tmp_path)
    assert "Newcomers on unseen tasks" in page.read_text("utf8")
    assert "| mice | 25.0 | ours | 60.0 | 90.0 |" in tables.read_text("utf8")


def test_what_means_hide_has_its_table(tmp_path):
    _, tables = write_report([record("ours", 0, (3, 4), (2, 1), role="ours")], tmp_path)
    assert "| ours | 42.5 | 15.0 | 15.0 | 30.0 | 5.0 |" in tables.read_text("utf8")


def test_names_are_escaped(written):
    assert "&lt;ours&gt;" in written[0]
    assert "<ours>" not in written[0]


def test_every_picture_has_its_numbers_in_a_table(written):
    """Two curves, two matrices, one picture of relevance, one of costs."""
    page, _ = written
    assert page.count("<svg") == 6
    assert page.count("<table") >= 6


def test_differences_with_their_intervals_stand_in_both(written):
    """Ours less local in Self: 20 and 20, an interval of no length; local is 50 and 60: 55 +- 7.1."""
    for text in written:
        assert "+20.0 ± 0.0" in text
        assert "55.0 ± 7.1" in text


def test_markdown_tables_have_one_cell_per_column(written):
    blocks = re.findall(r"(?:^\|.*\|\n)+", written[1], flags=re.MULTILINE)
    assert len(blocks) >= 6
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_the_same_records_give_the_same_page(written, tmp_path):
    records = [record("local", seed, (4, 6), (2, 2), role="local") for seed in (0, 1)]
    first = [path.read_text("utf8") for path in write_report(records, tmp_path / "a")]
    again = [path.read_text("utf8") for path in write_report(records, tmp_path / "b")]
    assert first == again


@pytest.mark.parametrize("name", ["all.jsonl", "all.jsonl.gz"])
def test_a_folder_and_the_file_that_it_is_collected_into_hold_the_same(tmp_path, name):
    runs = [record(method, seed, (6, 6), (2, 2)) for method in ("FedAvg", "local") for seed in (0, 1)]
    for run in runs:
        run.write(record_path(tmp_path / "out", run.method, run.seed))
    commands.collect(tmp_path / "out", tmp_path / name)
    assert read_records(tmp_path / name) == read_records(tmp_path / "out")
    assert [(one.method, one.seed) for one in read_records(tmp_path / name)] == [(one.method, one.seed) for one in runs]
    first = (tmp_path / name).read_bytes()
    commands.collect(tmp_path / "out", tmp_path / name)
    assert (tmp_path / name).read_bytes() == first
