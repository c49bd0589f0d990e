"""Scores as a tidy table: one row per number, every row of one frozen kind, ready for CSV, pandas or a report.

Start at `tidy_rows` (every client, task and round) and `summary_rows` (Self, Others and so on, per client and in the
mean); `to_csv` and `to_frame` take either.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from lightning_pfl.metrics.scores import PersonalizationScores

if TYPE_CHECKING:
    import pandas

__all__ = ["ScoreRow", "SummaryRow", "idle_rows", "summary_rows", "tidy_rows", "to_csv", "to_frame"]

EVERYBODY = "*"
"""Stands for all clients in a `SummaryRow`; no client may be called so."""


@dataclass(frozen=True)
class ScoreRow:
    """One client's model on one task after one round.

    Attributes:
        client: whose model.
        task: on which task.
        family: of the task; None where families are not known.
        relation: of the task to the client: "own"; "seen" or "unseen" for another's, by whether the client has a task
            of that family; "other" where families are not known.
        round: from 0.
        measure: such as "accuracy" or "log_likelihood".
        value: on the measure's own scale.
    """

    client: str
    task: str
    family: str | None
    relation: str
    round: int
    measure: str
    value: float


@dataclass(frozen=True)
class SummaryRow:
    """One score of one client, or of all.

    Attributes:
        client: whose; `EVERYBODY` for the mean over clients and for scores of the whole federation.
        score: such as "self_last" or "others_auc"; see `PersonalizationScores`.
        measure: such as "accuracy" or "log_likelihood".
        value: on the measure's own scale.
    """

    client: str
    score: str
    measure: str
    value: float


def tidy_rows(scores: PersonalizationScores, measure: str = "accuracy") -> list[ScoreRow]:
    """Every number that was added, by round, client and task; what was not evaluated (NaN) has no row.

    Args:
        scores: one measure's.
        measure: its name in the rows.

    Raises:
        ValueError: no round has been added.

    Example:
        >>> import torch
        >>> metric = PersonalizationScores({"a": ["cats"], "b": ["dogs"]}, families={"cats": "pets", "dogs": "pets"})
        >>> metric.update(torch.tensor([[0.5, 0.25], [float("nan"), 0.75]]), round=3)
        >>> for row in tidy_rows(metric):
        ...     print(row.client, row.task, row.relation, row.round, row.value)
        a cats own 3 0.5
        a dogs seen 3 0.25
        b dogs own 3 0.75
    """
    rounds, tables = scores.by_round()
    rows = []
    for round, table in zip(rounds.tolist(), tables.tolist(), strict=True):
        for client, line, owned in zip(scores.client_ids, table, scores.owned.tolist(), strict=True):
            row = scores.client_ids.index(client)
            for column, (task, value, own) in enumerate(zip(scores.task_ids, line, owned, strict=True)):
                if value == value:
                    if own or scores.related is None:
                        relation = "own" if own else "other"
                    else:
                        relation = "seen" if scores.related[row, column] else "unseen"
                    family = None if scores.families is None else scores.families[task]
                    rows.append(ScoreRow(client, task, family, relation, round, measure, value))
    return rows


def summary_rows(scores: PersonalizationScores, measure: str = "accuracy") -> list[SummaryRow]:
    """Each client's scores, then those of everybody; what does not exist has no row.

    Raises:
        ValueError: no round has been added.

    Example:
        >>> import torch
        >>> metric = PersonalizationScores({"a": ["cats"], "b": ["dogs"]})
        >>> metric.update(torch.tensor([[0.5, 0.25], [0.5, 0.75]]), round=0)
        >>> [(row.client, row.value) for row in summary_rows(metric) if row.score == "self_last"]
        [('a', 0.5), ('b', 0.75), ('*', 0.625)]
    """
    alone = [
        SummaryRow(client, name, measure, value)
        for name, values in scores.per_client().items()
        for client, value in zip(scores.client_ids, values.tolist(), strict=True)
    ]
    everybody = [SummaryRow(EVERYBODY, name, measure, float(value)) for name, value in scores.compute().items()]
    return [row for row in (*alone, *everybody) if row.value == row.value]


def idle_rows(idle: Mapping[str, Sequence[int]]) -> list[SummaryRow]:
    """How many rounds each client sat out because its stream had no data for it, so that a report shows it.

    Args:
        idle: rounds by client id (`Stream.idle_rounds`).

    Example:
        >>> idle_rows({"a": (), "b": (5, 6)})[1]
        SummaryRow(client='b', score='idle_rounds', measure='rounds', value=2.0)
    """
    return [SummaryRow(client, "idle_rounds", "rounds", float(len(rounds))) for client, rounds in idle.items()]


def to_csv(rows: Sequence[ScoreRow] | Sequence[SummaryRow]) -> str:
    r"""The rows as CSV with a header; None is an empty cell, numbers have all their digits.

    Raises:
        ValueError: no rows, which would leave no header.

    Example:
        >>> to_csv([SummaryRow("a", "self_last", "accuracy", 0.5)])
        'client,score,measure,value\na,self_last,accuracy,0.5\n'
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, _names(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def to_frame(rows: Sequence[ScoreRow] | Sequence[SummaryRow]) -> pandas.DataFrame:
    """The rows as a pandas data frame.

    Raises:
        ModuleNotFoundError: pandas is not installed.
        ValueError: no rows.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("A data frame needs pandas: pip install pandas. `to_csv` needs nothing.") from error
    return pandas.DataFrame([asdict(row) for row in rows], columns=_names(rows))


def _names(rows: Sequence[Any]) -> list[str]:
    if not rows:
        raise ValueError("There are no rows to write. Has a round been evaluated?")
    return [field.name for field in fields(rows[0])]
