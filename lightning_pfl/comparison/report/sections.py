"""A report's sections: words, pictures and tables, made of `Findings`. HTML and Markdown show the same tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lightning_pfl.comparison.evaluation import AGGREGATED, TRAINED
from lightning_pfl.comparison.record import Rows
from lightning_pfl.comparison.report import figures
from lightning_pfl.comparison.report.findings import MEASURES, Findings, Row
from lightning_pfl.comparison.statistics import Summary

__all__ = ["Cell", "Picture", "Section", "Table", "TableRow", "sections_of"]


@dataclass(frozen=True)
class Cell:
    """A text; ``up`` or ``down`` marks a difference whose interval leaves out 0."""

    text: str
    mark: str = ""


@dataclass(frozen=True)
class TableRow:
    """Cells, the first of them the row's name."""

    cells: Sequence[Cell]
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under columns."""

    title: str
    columns: Sequence[str]
    rows: Sequence[TableRow]


@dataclass(frozen=True)
class Picture:
    """An SVG and what it shows."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    title: str
    words: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


def sections_of(findings: Findings) -> list[Section]:
    """All sections, in the order of the page."""
    makers: Sequence[Callable[[Findings], Section | None]] = (
        _scores,
        _curves,
        _further,
        _newcomers,
        _matrices,
        _relevance,
        _costs,
        _setting,
    )
    return [section for make in makers if (section := make(findings)) is not None]


def _scores(findings: Findings) -> Section:
    words = [
        "Self: the mean over clients of the accuracy on their own tasks, in percent; all of them count in every round. "
        "Others: on the tasks that they do not own. Scores are mean ± standard deviation over seeds; differences are "
        "paired by seed, mean ± half of the 95 % interval of Student's t, and coloured where that leaves out 0.",
        f"Without looking, Self is {findings.chance[0]:.1f} and Others {findings.chance[1]:.1f}. The best baseline, "
        "after which the last difference of each is named, has the highest mean over the seeds that all baselines "
        "have, which favours it a little.",
        "Models are asked twice: as their own training of the last round leaves them, which is what papers mostly "
        "score, and after the server's last answer, which is what clients have in their hands when the run is over.",
    ]
    tables = [
        _score_table(findings, "As their own training leaves them", TRAINED),
        _score_table(findings, "After the server's last answer", AGGREGATED),
    ]
    return Section("Scores after the last round", words, tables=tables)


def _score_table(findings: Findings, title: str, moment: str) -> Table:
    names = findings.references[moment]
    columns = ["method", "seeds"]
    for measure in MEASURES:
        kinds = {"local": "local", "control": "control", f"baseline {measure}": "baseline"}
        columns += [measure, *(f"{measure} - {names.get(kind, said)}" for kind, said in kinds.items())]
    rows = [
        TableRow(
            [
                Cell(row.method),
                Cell(str(row.scores[moment][0].count)),
                *(cell for at in range(len(MEASURES)) for cell in _measure_cells(row, moment, at)),
            ],
            row.role,
        )
        for row in findings.rows
    ]
    return Table(title, columns, rows)


def _measure_cells(row: Row, moment: str, at: int) -> Iterator[Cell]:
    yield Cell(_mean_sd(row.scores[moment][at]))
    for kind in ("local", "control", "baseline"):
        yield _difference(row.against[moment][kind][at])


def _curves(findings: Findings) -> Section:
    named = _named(findings)
    pictures, tables = [], []
    for measure in MEASURES:
        lines = [line for line in findings.curves if line.measure == measure]
        rounds = sorted({round for line in lines for round in line.points})
        pictures.append(Picture(figures.curves(lines, named), f"{measure} by round; bars are 95 % intervals."))
        rows = [
            TableRow(
                [Cell(line.method), *(Cell(_mean_half(line.points[r]) if r in line.points else "") for r in rounds)],
                line.role,
            )
            for line in lines
        ]
        tables.append(Table(f"{measure} by round, mean ± half interval", ["method", *map(str, rounds)], rows))
    return Section("Over the rounds", pictures=pictures, tables=tables)


_FURTHER = {
    "self_auc": "Self, area",
    "others_auc": "Others, area",
    "forgetting": "forgetting",
    "self_worst_decile": "Self, worst tenth",
    "self_std": "Self, between clients",
}


def _further(findings: Findings) -> Section:
    words = [
        "Of models as their own training leaves them. Area: under the curve over the rounds that were asked. "
        "Forgetting: on each of a client's own tasks, the best round before the last less the last; below 0 where the "
        "last is the best. Worst tenth: Self of the lowest tenth of clients. Between clients: standard deviation of "
        "their Self."
    ]
    rows = [
        TableRow([Cell(one.method), *(Cell(_mean_sd(one.scores[key])) for key in _FURTHER)], one.role)
        for one in findings.further
    ]
    table = Table("Mean ± standard deviation over seeds", ["method", *_FURTHER.values()], rows)
    return Section("What means hide", words, tables=[table])


def _newcomers(findings: Findings) -> Section | None:
    if not findings.newcomers:
        return None
    lines, steps = findings.newcomers, sorted({step for line in findings.newcomers for step in line.points})
    mean = Table(
        "Mean over unseen tasks and models, ± half interval",
        ["method", *(f"{step} steps" for step in steps)],
        [TableRow([Cell(one.method), *(Cell(_mean_half(one.points[s])) for s in steps)], one.role) for one in lines],
    )
    each = Table(
        "Every unseen task, in the mean over models and seeds",
        ["task", "chance", "method", *(f"{step} steps" for step in steps)],
        [
            TableRow(
                [
                    Cell(one.task),
                    Cell(_number(one.chance, 1)),
                    Cell(one.method),
                    *(Cell(_number(one.points[step], 1)) for step in steps),
                ]
            )
            for one in sorted(findings.newcomer_tasks, key=lambda one: one.task)
        ],
    )
    words = [
        "Clients that took no part, one per unseen task and model: each starts from what the run has for it (a method "
        "that weighs by relevance asks its sketch) and trains on its own task."
    ]
    picture = Picture(
        figures.curves(lines, [one.method for one in lines], along="optimizer steps of the newcomer"),
        "Newcomers by their own steps; bars are 95 % intervals.",
    )
    return Section("Newcomers on unseen tasks", words, [picture], [mean, each])


def _matrices(findings: Findings) -> Section | None:
    if not findings.matrices:
        return None
    across, down = "on this client's tasks", "this client's model"
    pictures, tables = [], []
    for one in findings.matrices:
        percent = [[100 * value for value in row] for row in one.rows]
        caption = f"{one.method}: accuracy in % of every client's last model on every client's tasks."
        pictures.append(Picture(figures.heat_map(percent, findings.clients, across=across, down=down), caption))
        tables.append(_matrix(one.method, findings.clients, percent, 1))
    return Section("Every client's model on every client's tasks", pictures=pictures, tables=tables)


def _relevance(findings: Findings) -> Section | None:
    if not findings.relevance:
        return None
    pictures, tables = [], [_matrix("In truth", findings.clients, findings.truth, 2)]
    for one in findings.relevance:
        shown: dict[str, Rows] = {"in truth": findings.truth, f"{one.method}: weights": one.weights}
        if one.similarity is not None:
            shown[f"{one.method}: cosines"] = one.similarity
        caption = f"{one.method}: who takes how much of whom in the last round, beside how related their tasks are."
        pictures.append(
            Picture(figures.heat_maps(shown, findings.clients, across="of this client", down="this client"), caption)
        )
        tables.append(_matrix(f"{one.method}: weights", findings.clients, one.weights, 3))
        if one.similarity is not None:
            tables.append(_matrix(f"{one.method}: cosines", findings.clients, one.similarity, 3))
    agreement = Table(
        "Correlation with the truth over pairs of clients",
        ["method", "weights, Pearson", "weights, Spearman", "cosines, Pearson", "cosines, Spearman"],
        [
            TableRow([Cell(one.method), *(Cell(_number(x, 2)) for x in (*one.of_weights, *one.of_similarity))])
            for one in findings.relevance
        ],
    )
    words = ["In truth, two clients are as related as their tasks are in the mean over all pairs of them."]
    return Section("Relevance, and what is related in truth", words, pictures, [agreement, *tables])


def _costs(findings: Findings) -> Section:
    rows = [
        TableRow(
            [
                Cell(cost.method),
                Cell(f"{cost.sent / 1e3:,.0f}"),
                Cell(f"{cost.received / 1e3:,.0f}"),
                Cell(_number(cost.operations, 2)),
                *(Cell(f"{seconds:.0f}") for seconds in cost.seconds),
                *(Cell(_number(score, 1)) for score in cost.scores),
            ],
            cost.role,
        )
        for cost in findings.costs
    ]
    columns = ["method", "kB sent", "kB received", "operations", "training, s", "evaluation, s", *MEASURES]
    picture = Picture(figures.costs(findings.costs, _named(findings)), "Self against bytes and against operations.")
    words = [
        "Bytes are per client in the whole run. Operations are multiplications and additions of matrix products in "
        "training, sketches included, of the layers that are run, relative to training alone. Seconds are of processor "
        "time."
    ]
    return Section("Bytes and compute", words, [picture], [Table("", columns, rows)])


def _setting(findings: Findings) -> Section:
    clients = [
        TableRow([Cell(client), Cell(model), Cell(", ".join(own))])
        for client, model, own in zip(findings.clients, findings.models, findings.own, strict=True)
    ]
    skipped = {"title", "make", "arguments", "lr", "lr_pq", "role", "place"}
    about = {**{k: v for k, v in findings.about.items() if k not in skipped}, "seeds": list(findings.seeds)}
    rows = [TableRow([Cell(name.replace("_", " ")), Cell(_said(value))]) for name, value in about.items()]
    rows += [TableRow([Cell(name), Cell(version)]) for name, version in findings.versions.items()]
    return Section(
        "What was run",
        tables=[Table("", ["what", "value"], rows), Table("Clients", ["client", "model", "tasks in time"], clients)],
    )


def _named(findings: Findings) -> list[str]:
    """Methods that a picture tells apart."""
    ours = [row.method for row in findings.rows if row.role == "ours"]
    return list(dict.fromkeys([*findings.references[TRAINED].values(), *ours]))


def _matrix(title: str, names: Sequence[str], rows: Rows, digits: int) -> Table:
    return Table(
        title,
        ["", *names],
        [
            TableRow([Cell(name), *(Cell(_number(value, digits)) for value in row)])
            for name, row in zip(names, rows, strict=True)
        ],
    )


def _difference(one: Summary) -> Cell:
    if not one.count:
        return Cell("")
    if one.count == 1:
        return Cell(f"{one.mean:+.1f}")
    return Cell(f"{one.mean:+.1f} ± {one.half:.1f}", ("up" if one.mean > 0 else "down") if one.is_decided else "")


def _mean_sd(one: Summary) -> str:
    return _number(one.mean, 1) + ("" if math.isnan(one.sd) else f" ± {one.sd:.1f}")


def _mean_half(one: Summary) -> str:
    return _number(one.mean, 1) + ("" if math.isnan(one.half) else f" ± {one.half:.1f}")


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _said(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {one}" for name, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
