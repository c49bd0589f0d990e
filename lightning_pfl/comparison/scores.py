"""Self and Others of a record, as shares of right answers.

A client's Self is the mean over its own tasks, its Others the mean over all tasks that it does not own; the
federation's are the means over clients. All of a client's own tasks count in every round, also those that are still to
come, as in the Co-LoRA paper's evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import torch

from lightning_pfl.comparison.evaluation import TRAINED, Table
from lightning_pfl.comparison.record import Record
from lightning_pfl.metrics.scores import PersonalizationScores

__all__ = ["client_matrix", "client_scores", "curve", "further_scores", "last_scores", "table_scores"]


def client_scores(record: Record, table: Table) -> list[tuple[float, float]]:
    """Self and Others of every client, NaN where nothing was asked."""
    found = []
    for own, right, total in zip(record.own, table.right, table.total, strict=True):
        columns = range(len(record.tasks))
        mine = [right[at] / total[at] for at in columns if record.tasks[at] in own and total[at]]
        theirs = [right[at] / total[at] for at in columns if record.tasks[at] not in own and total[at]]
        found.append((_mean(mine), _mean(theirs)))
    return found


def table_scores(record: Record, table: Table) -> tuple[float, float]:
    """Self and Others of the federation."""
    own, others = zip(*client_scores(record, table), strict=True)
    return _mean(own), _mean(others)


def curve(record: Record, *, moment: str = TRAINED) -> dict[int, tuple[float, float]]:
    """Self and Others by round."""
    return {table.round: table_scores(record, table) for table in record.tables if table.moment == moment}


def last_scores(record: Record, *, moment: str = TRAINED) -> tuple[float, float]:
    """Self and Others after the last round; NaN without an evaluation of that moment."""
    found = curve(record, moment=moment)
    return found[max(found)] if found else (math.nan, math.nan)


def client_matrix(record: Record, *, moment: str = TRAINED) -> list[list[float]]:
    """Client i's last model on client j's tasks, in the mean over these, ``[N][N]``."""
    table = max((table for table in record.tables if table.moment == moment), key=lambda table: table.round)
    rows = []
    for right, total in zip(table.right, table.total, strict=True):
        shares = {task: r / t for task, r, t in zip(record.tasks, right, total, strict=True) if t}
        rows.append([_mean([shares[task] for task in own if task in shares]) for own in record.own])
    return rows


def further_scores(record: Record, *, moment: str = TRAINED) -> dict[str, float]:
    """What the means of the last round do not say, as `PersonalizationScores` names it: areas under the rounds,
    forgetting, the worst tenth of the clients and how far apart clients are."""
    metric = PersonalizationScores(dict(zip(record.clients, record.own, strict=True)), all_tasks=record.tasks)
    for table in record.tables:
        if table.moment == moment:
            shares = torch.tensor(table.right) / torch.tensor(table.total)  # 0 / 0, NaN, where nothing was asked
            metric.update(shares, round=table.round)
    return {name: float(value) for name, value in metric.compute().items()}


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan
