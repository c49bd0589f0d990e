"""Tidy tables say of every number what it is."""

import csv
import io
import sys

import pytest
import torch

from lightning_pfl.metrics import PersonalizationScores, idle_rows, summary_rows, tidy_rows, to_csv, to_frame

NAN = float("nan")


@pytest.fixture
def scores():
    families = {"cats": "animals", "dogs": "animals", "flags": "signs"}
    metric = PersonalizationScores({"a": ["cats"], "b": ["dogs", "flags"]}, families=families)
    metric.update(torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.6, NAN]]), round=4)
    metric.update(torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]), round=1)
    return metric


def test_every_number_has_a_row_in_the_order_of_rounds(scores):
    rows = tidy_rows(scores, "log_likelihood")

    assert len(rows) == 11  # twelve cells, one not evaluated
    assert [row.round for row in rows] == [1] * 6 + [4] * 5
    first = rows[0]
    assert (first.client, first.task, first.family, first.relation) == ("a", "cats", "animals", "own")
    assert (first.measure, first.value) == ("log_likelihood", pytest.approx(0.1))
    relations = {(row.client, row.task): row.relation for row in rows}
    assert relations["a", "dogs"] == "seen"
    assert relations["a", "flags"] == "unseen"
    assert relations["b", "flags"] == "own"


def test_without_families_others_are_just_others():
    metric = PersonalizationScores({"a": ["cats"], "b": ["dogs"]})
    metric.update(torch.zeros(2, 2), round=0)

    assert [(row.family, row.relation) for row in tidy_rows(metric)][:2] == [(None, "own"), (None, "other")]


def test_summaries_hold_every_client_and_then_all(scores):
    """Last round: a .5, b .6 (flags were not evaluated); mean .55; b has no unseen family, so no row."""
    rows = summary_rows(scores)
    values = {(row.client, row.score): row.value for row in rows}

    assert values["a", "self_last"] == pytest.approx(0.5)
    assert values["b", "self_last"] == pytest.approx(0.6)
    assert values["*", "self_last"] == pytest.approx(0.55)
    assert values["a", "others_unseen_last"] == pytest.approx(0.3)
    assert ("b", "others_unseen_last") not in values
    assert values["*", "self_std"] == pytest.approx(0.05)
    assert all(row.value == row.value for row in rows)


def test_csv_is_read_back_as_it_was(scores):
    rows = tidy_rows(scores)
    again = list(csv.DictReader(io.StringIO(to_csv(rows))))

    assert len(again) == len(rows)
    assert [float(line["value"]) for line in again] == [row.value for row in rows]
    assert again[1]["relation"] == "seen"
    with pytest.raises(ValueError, match="no rows to write"):
        to_csv([])


def test_a_data_frame_has_one_column_per_field(scores):
    pandas = pytest.importorskip("pandas")
    frame = to_frame(tidy_rows(scores))

    assert isinstance(frame, pandas.DataFrame)
    mean = frame[(frame["relation"] == "own") & (frame["round"] == 1)]["value"].mean()
    assert mean == pytest.approx((0.1 + 0.5 + 0.6) / 3)


def test_without_pandas_the_error_names_the_way_out(scores, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)

    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        to_frame(tidy_rows(scores))


def test_rounds_without_data_are_rows_too():
    assert [(row.client, row.value) for row in idle_rows({"a": (), "b": (3, 4, 5)})] == [("a", 0.0), ("b", 3.0)]
