"""What records say, as numbers: the content of every table and every picture of a report.

Start at `Findings.of`. All scores are in percent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import final

from lightning_pfl.comparison.evaluation import AGGREGATED, TRAINED
from lightning_pfl.comparison.record import Record, Rows
from lightning_pfl.comparison.scores import client_matrix, curve, further_scores, last_scores
from lightning_pfl.comparison.statistics import Summary, paired, pearson, spearman, summary

__all__ = ["MEASURES", "Cost", "Curve", "Findings", "Further", "Matrix", "NewcomerTask", "Relevance", "Row"]

MEASURES = ("Self", "Others")
_MOMENTS = (TRAINED, AGGREGATED)


@dataclass(frozen=True)
class Row:
    """One method's last scores.

    Attributes:
        method: its name.
        role: what it is in the comparison.
        scores: Self and Others, by moment: of clients' models as their own training leaves them, and of those that
            they have after aggregation.
        against: differences of Self and Others, by moment and by what they are taken to: "local", "control" or
            "baseline".
    """

    method: str
    role: str
    scores: Mapping[str, tuple[Summary, Summary]]
    against: Mapping[str, Mapping[str, tuple[Summary, Summary]]]


@dataclass(frozen=True)
class Curve:
    """One method's score by round.

    Attributes:
        method: its name.
        role: what it is in the comparison.
        measure: "Self" or "Others".
        points: by how many rounds had been run.
    """

    method: str
    role: str
    measure: str
    points: Mapping[int, Summary]


@dataclass(frozen=True)
class Further:
    """What the means of the last round hide: of clients' models as their own training leaves them.

    Attributes:
        method: its name.
        role: what it is in the comparison.
        scores: by the names of `PersonalizationScores`.
    """

    method: str
    role: str
    scores: Mapping[str, Summary]


@dataclass(frozen=True)
class Matrix:
    """One method's last scores of client i's model on client j's tasks, in the mean over seeds."""

    method: str
    rows: Rows


@dataclass(frozen=True)
class Relevance:
    """What a method took for related, beside what is.

    Attributes:
        method: its name.
        weights: its last mixtures, in the mean over seeds.
        similarity: its last cosines, in the mean over seeds; None without sketches.
        of_weights: correlation with the truth over pairs of different clients, by numbers and by ranks.
        of_similarity: as of weights; NaN without sketches.
    """

    method: str
    weights: Rows
    similarity: Rows | None
    of_weights: tuple[float, float]
    of_similarity: tuple[float, float]


@dataclass(frozen=True)
class NewcomerTask:
    """What newcomers know of one unseen task.

    Attributes:
        method: its name.
        task: name of the task.
        chance: of answering without looking.
        points: score by optimizer steps of the newcomer, in the mean over models and seeds.
    """

    method: str
    task: str
    chance: float
    points: Mapping[int, float]


@dataclass(frozen=True)
class Cost:
    """What a run of a method costs, in the mean over seeds.

    Attributes:
        method: its name.
        role: what it is in the comparison.
        sent: bytes per client in the whole run.
        received: bytes per client in the whole run.
        operations: of training, relative to training alone (or to the cheapest method).
        seconds: of processor time, training and evaluation.
        scores: Self and Others.
    """

    method: str
    role: str
    sent: float
    received: float
    operations: float
    seconds: tuple[float, float]
    scores: tuple[float, float]


@final
@dataclass(frozen=True)
class Findings:
    """All of it.

    Attributes:
        about: what was run, from the first record.
        clients: ids.
        models: of the clients.
        own: tasks of the clients.
        seeds: that occur.
        chance: Self and Others of answering without looking.
        rows: in the order of the comparison.
        references: by moment, names of the methods that differences are taken to, by "local", "control" and, per
            measure, "baseline Self" and "baseline Others".
        curves: Self and Others by round.
        further: areas, forgetting and differences between clients.
        matrices: of what each client's model knows of the others' tasks.
        truth: how related clients are.
        relevance: of methods that mix.
        costs: bytes, operations, seconds.
        versions: of the libraries, from the first record.
        newcomers: of clients that came after the run, by their own optimizer steps; the mean over tasks and models.
        newcomer_tasks: per method and unseen task, its score by step, in the mean over models and seeds, and chance.
    """

    about: Mapping[str, object]
    clients: Sequence[str]
    models: Sequence[str]
    own: Sequence[Sequence[str]]
    seeds: Sequence[int]
    chance: tuple[float, float]
    rows: Sequence[Row]
    references: Mapping[str, Mapping[str, str]]
    curves: Sequence[Curve]
    further: Sequence[Further]
    matrices: Sequence[Matrix]
    truth: Rows
    relevance: Sequence[Relevance]
    costs: Sequence[Cost]
    versions: Mapping[str, str]
    newcomers: Sequence[Curve] = ()
    newcomer_tasks: Sequence[NewcomerTask] = ()

    @staticmethod
    def of(records: Sequence[Record]) -> Findings:
        """Read records of one comparison.

        Args:
            records: any number per method; the order of methods is that in which they first occur.

        Raises:
            ValueError: none, or records of different clients, tasks or settings.
        """
        by_method = _grouped(records)
        first = records[0]
        scores = {name: {moment: _scores(runs, moment) for moment in _MOMENTS} for name, runs in by_method.items()}
        roles = {name: str(runs[0].about.get("role", "baseline")) for name, runs in by_method.items()}
        references = {
            moment: _references(roles, {name: one[moment] for name, one in scores.items()}) for moment in _MOMENTS
        }
        rows = [
            Row(
                name,
                roles[name],
                {moment: _summaries(scores[name][moment]) for moment in _MOMENTS},
                {moment: _differences(name, moment, scores, references[moment]) for moment in _MOMENTS},
            )
            for name in by_method
        ]
        shown = list(dict.fromkeys(references[TRAINED].values()))
        shown += [name for name, role in roles.items() if role == "ours" and name not in shown]
        return Findings(
            about=first.about,
            clients=first.clients,
            models=first.models,
            own=first.own,
            seeds=sorted({record.seed for record in records}),
            chance=_chance(first),
            rows=rows,
            references=references,
            curves=[one for name, runs in by_method.items() for one in _curves(name, roles[name], runs)],
            further=[_further(name, roles[name], runs) for name, runs in by_method.items()],
            matrices=[Matrix(name, _mean_rows([client_matrix(run) for run in by_method[name]])) for name in shown],
            truth=first.relations,
            relevance=[one for name, runs in by_method.items() if (one := _relevance(name, runs)) is not None],
            costs=_costs(by_method, roles, scores),
            versions=first.versions,
            newcomers=[line for name, runs in by_method.items() for line in _newcomers(name, roles[name], runs)],
            newcomer_tasks=[one for name, runs in by_method.items() for one in _newcomer_tasks(name, runs)],
        )


def _grouped(records: Sequence[Record]) -> dict[str, list[Record]]:
    if not records:
        raise ValueError("A report needs at least one finished run.")
    same = ("scenario", "assignment", "side", "rounds", "steps", "batch_size", "num_train")
    first = records[0]
    grouped: dict[str, list[Record]] = {}
    for record in records:
        differ = [name for name in same if record.about.get(name) != first.about.get(name)]
        differ += [
            name for name in ("clients", "models", "tasks", "own") if getattr(record, name) != getattr(first, name)
        ]
        if differ:
            raise ValueError(
                f"Runs of one report must be of one comparison, but {record.method!r}, seed {record.seed}, differs "
                f"from {first.method!r}, seed {first.seed}, in {differ}."
            )
        runs = grouped.setdefault(record.method, [])
        if any(run.seed == record.seed for run in runs):
            raise ValueError(f"{record.method!r} has seed {record.seed} twice.")
        if runs and runs[0].key != record.key:
            raise ValueError(
                f"{record.method!r} was run with different settings with seeds {runs[0].seed} and {record.seed}."
            )
        runs.append(record)
    return grouped


def _scores(runs: Sequence[Record], moment: str) -> tuple[dict[int, float], dict[int, float]]:
    """Self and Others in percent, by seed."""
    found = {run.seed: last_scores(run, moment=moment) for run in runs}
    own, others = ({seed: 100 * pair[at] for seed, pair in found.items()} for at in (0, 1))
    return own, others


def _summaries(scores: tuple[Mapping[int, float], Mapping[int, float]]) -> tuple[Summary, Summary]:
    own, others = (summary(list(values.values())) for values in scores)
    return own, others


def _references(
    roles: Mapping[str, str], scores: Mapping[str, tuple[Mapping[int, float], Mapping[int, float]]]
) -> dict[str, str]:
    found = {
        role: name for role in ("local", "control") for name in [one for one, is_ in roles.items() if is_ == role][:1]
    }
    baselines = [name for name, role in roles.items() if role in ("local", "baseline")]
    if not baselines:
        return found
    shared = sorted(set.intersection(*(set(scores[name][0]) for name in baselines)))
    for at, measure in enumerate(MEASURES):
        if shared:  # an easy seed that others lack makes nobody the best
            found[f"baseline {measure}"] = max(baselines, key=lambda name: fmean(scores[name][at][s] for s in shared))
    return found


def _differences(
    name: str,
    moment: str,
    scores: Mapping[str, Mapping[str, tuple[Mapping[int, float], Mapping[int, float]]]],
    references: Mapping[str, str],
) -> dict[str, tuple[Summary, Summary]]:
    found = {}
    for kind in ("local", "control", "baseline"):
        pair = []
        for at, measure in enumerate(MEASURES):
            other = references.get(kind if kind != "baseline" else f"baseline {measure}")
            pair.append(
                summary([])
                if other is None or other == name
                else paired(scores[name][moment][at], scores[other][moment][at])
            )
        found[kind] = (pair[0], pair[1])
    return found


def _chance(record: Record) -> tuple[float, float]:
    by_task = dict(zip(record.tasks, record.chance, strict=True))
    own = fmean(fmean(by_task[task] for task in mine) for mine in record.own)
    others = fmean(fmean(chance for task, chance in by_task.items() if task not in mine) for mine in record.own)
    return 100 * own, 100 * others


def _curves(name: str, role: str, runs: Sequence[Record]) -> list[Curve]:
    curves = [curve(run) for run in runs]
    rounds = sorted({round for one in curves for round in one})
    found = []
    for at, measure in enumerate(MEASURES):
        points = {round: summary([100 * one[round][at] for one in curves if round in one]) for round in rounds}
        found.append(Curve(name, role, measure, {r: point for r, point in points.items() if point.count}))
    return found


def _further(name: str, role: str, runs: Sequence[Record]) -> Further:
    found = [further_scores(run) for run in runs]
    return Further(name, role, {key: summary([100 * one[key] for one in found]) for key in found[0]})


def _newcomers(name: str, role: str, runs: Sequence[Record]) -> list[Curve]:
    came = [run.newcomers for run in runs if run.newcomers]
    if not came:
        return []
    steps = came[0][0].steps
    means = {
        step: summary([100 * fmean(one.right[at] / one.total for one in arrivals) for arrivals in came])
        for at, step in enumerate(steps)
    }
    return [Curve(name, role, "Newcomers", means)]


def _newcomer_tasks(name: str, runs: Sequence[Record]) -> list[NewcomerTask]:
    arrivals = [one for run in runs for one in run.newcomers]
    found = []
    for task in dict.fromkeys(one.task for one in arrivals):
        mine = [one for one in arrivals if one.task == task]
        points = {step: 100 * fmean(one.right[at] / one.total for one in mine) for at, step in enumerate(mine[0].steps)}
        found.append(NewcomerTask(name, task, 100 * mine[0].chance, points))
    return found


def _relevance(name: str, runs: Sequence[Record]) -> Relevance | None:
    mixed = [run for run in runs if run.weights is not None]
    if not mixed:
        return None
    weights = _mean_rows([run.weights for run in mixed if run.weights is not None])
    cosines = [run.similarity for run in mixed if run.similarity is not None]
    similarity = _mean_rows(cosines) if cosines else None
    truth = mixed[0].relations
    nothing = (math.nan, math.nan)
    return Relevance(
        name,
        weights,
        similarity,
        _agreement(weights, truth),
        nothing if similarity is None else _agreement(similarity, truth),
    )


def _agreement(found: Rows, truth: Rows) -> tuple[float, float]:
    pairs = [
        (found[i][j], truth[i][j])
        for i in range(len(found))
        for j in range(len(found))
        if i != j and not math.isnan(found[i][j])
    ]
    if len(pairs) < 3:
        return math.nan, math.nan
    one, other = zip(*pairs, strict=True)
    return pearson(one, other), spearman(one, other)


def _costs(
    by_method: Mapping[str, Sequence[Record]],
    roles: Mapping[str, str],
    scores: Mapping[str, Mapping[str, tuple[Mapping[int, float], Mapping[int, float]]]],
) -> list[Cost]:
    operations = {name: fmean(run.operations for run in runs) for name, runs in by_method.items()}
    alone = [name for name, role in roles.items() if role == "local"]
    least = operations[alone[0]] if alone else min(operations.values())
    return [
        Cost(
            name,
            roles[name],
            fmean(fmean(run.sent) for run in runs),
            fmean(fmean(run.received) for run in runs),
            operations[name] / least if least else math.nan,
            (fmean(run.seconds["training"] for run in runs), fmean(run.seconds["evaluation"] for run in runs)),
            (fmean(scores[name][TRAINED][0].values()), fmean(scores[name][TRAINED][1].values())),
        )
        for name, runs in by_method.items()
    ]


def _mean_rows(matrices: Sequence[Rows]) -> list[list[float]]:
    """Cell by cell over those that have a number there; NaN where none has."""
    size = range(len(matrices[0]))
    cells = [
        [[m[i][j] for m in matrices if m[i][j] is not None and not math.isnan(m[i][j])] for j in size] for i in size
    ]
    return [[fmean(cell) if cell else math.nan for cell in row] for row in cells]
