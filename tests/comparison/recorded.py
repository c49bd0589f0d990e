"""Records written by hand: two clients with a task each, ten questions of each, so that scores are tenths."""

import dataclasses

from lightning_pfl.comparison.evaluation import AGGREGATED, TRAINED, Table
from lightning_pfl.comparison.record import Record

ABOUT = {
    "title": "By hand",
    "scenario": "dynamic",
    "assignment": ["llama", "gemma"],
    "side": "test",
    "rounds": 2,
    "steps": 4,
    "batch_size": 8,
    "num_train": 32,
}


def record(method, seed, own, others, *, role="baseline", early=(5, 5), aggregated=None, **changes):
    """Right answers out of ten: `own` of client a and b on their own task, `others` on the other's."""
    total, own_only = [[10, 10], [10, 10]], [[10, 0], [0, 10]]

    def right(mine, theirs):
        return [[mine[0], theirs[0]], [theirs[1], mine[1]]]

    last = aggregated or (own, others)
    tables = [
        Table(1, TRAINED, right(early, (0, 0)), own_only),
        Table(2, TRAINED, right(own, others), total),
        Table(2, AGGREGATED, right(*last), total),
    ]
    made = Record(
        method=method,
        seed=seed,
        key=method,
        about={**ABOUT, "role": role, "place": 0},
        clients=["a", "b"],
        models=["llama", "gemma"],
        tasks=["cats", "dogs"],
        own=[["cats"], ["dogs"]],
        chance=[0.5, 0.25],
        relations=[[0.0, 1.0], [1.0, 0.0]],
        tables=tables,
        weights=None,
        similarity=None,
        sent=[1000, 3000],
        received=[0, 0],
        operations=100.0,
        seconds={"training": 2.0, "evaluation": 1.0},
    )
    return dataclasses.replace(made, **changes)
