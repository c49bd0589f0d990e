"""Which tasks are related, and why: the truth that a measure of relevance is judged by, and what an oracle weighs by.

Start at `LINKS` and `relatedness`. A link is strong where one task's data teach the other one's question (the same
operation, mostly on pictures of the same kind), weak where the tasks share only pictures or only a part of the
operation. It was written down with the tasks, before any method was run on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import final

from lightning_pfl.benchmark.suite.catalogue import TASKS, UNSEEN


@final
@dataclass(frozen=True)
class Link:
    """Two related tasks.

    Attributes:
        tasks: their ids, such as ("A3", "A6"), in the catalogue's order.
        strong: the same operation; else only pictures, or a part of the operation, are shared.
        reason: what they share.
    """

    tasks: tuple[str, str]
    strong: bool
    reason: str


_STRONG = (
    ("counting copies of a thing", "A1 K2 K12"),
    ("damage drawn over a part of a photograph", "A3 A6"),
    ("where things of named kinds are in a scene", "A5 K15"),
    ("which kind a thing is of", "A11 B6 B10"),
    ("the thing that a quality stands for", "B2 B8 B11"),
    ("the picture among four that a phrase means", "B2 B5"),
    ("what people do", "B3 B9 B12"),
    ("what is wrong with a photograph", "B1 K8 K9"),
    ("the better version of a photograph", "K3 K14"),
    ("the sort of a food", "K1 K11 K16"),
)
_WEAK = (
    ("counting, but comparing two counts", "A1 A8"),
    ("counting, but comparing two counts", "A8 K2"),
    ("counting, but comparing two counts", "A8 K12"),
    ("pieces of clothing", "A1 A4 A7"),
    ("what changed from one picture to the next", "A2 A9 A12"),
    ("the quality of photographs", "B1 K3 K8 K9 K14"),
    ("flags of countries", "K4 K6"),
    ("kinds of things in one scene or alone", "B6 K15"),
    ("kinds of things in one scene or alone", "A11 K15"),
    ("animals and their classes", "A11 K5"),
    ("animals and their classes", "B6 K5"),
    ("colours of things", "A7 K13"),
)
_UNSEEN = (
    (True, "which kind a thing is of", "B6 U1"),
    (True, "which kind a thing is of", "B6 U2"),
    (True, "which kind a thing is of", "U1 U2"),
    (False, "which kind a thing is of", "A11 U1"),
    (False, "which kind a thing is of", "A11 U2"),
    (False, "comparing two counts", "A8 U4"),
    (False, "playing cards", "U3 U4"),
)


def _links() -> Iterator[Link]:
    order = {spec.id: place for place, spec in enumerate((*TASKS, *UNSEEN))}
    groups = [(True, *group) for group in _STRONG] + [(False, *group) for group in _WEAK] + list(_UNSEEN)
    taken: set[tuple[str, str]] = set()
    for strong, reason, names in groups:
        for first, second in combinations(sorted(names.split(), key=order.__getitem__), 2):
            if (first, second) not in taken:
                taken.add((first, second))
                yield Link((first, second), strong, reason)


LINKS: tuple[Link, ...] = tuple(_links())
"""All links, strong ones first; a pair appears once, under its strongest reason."""

WEAK = 0.3
"""What a weak link counts, where a strong one counts 1."""


def relatedness(tasks: Sequence[str], *, weak: float = WEAK) -> list[list[float]]:
    """How related tasks are, as a symmetric matrix [n][n] with ones on its diagonal.

    Args:
        tasks: ids such as "A3".
        weak: what a weak link counts, 0 to 1.

    Raises:
        ValueError: an id that no task has.

    Example:
        >>> relatedness(["A3", "A6", "K9"])
        [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    known = {spec.id for spec in (*TASKS, *UNSEEN)}
    if unknown := [name for name in tasks if name not in known]:
        raise ValueError(f"`tasks` must be ids of the suite, such as 'A3', but has {unknown}.")
    weights = {link.tasks: 1.0 if link.strong else weak for link in LINKS}
    return [
        [1.0 if one == two else weights.get((one, two), weights.get((two, one), 0.0)) for two in tasks] for one in tasks
    ]


def relatives(task: str, *, strong: bool = True) -> tuple[str, ...]:
    """Ids of the tasks with a strong (or any) link to a task.

    Example:
        >>> relatives("K1"), relatives("A10")
        (('K11', 'K16'), ())
    """
    found = [link for link in LINKS if task in link.tasks and (link.strong or not strong)]
    return tuple(link.tasks[1 - link.tasks.index(task)] for link in found)
