"""Methods that only a comparison can make, since it knows how tasks are related in truth."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_pfl.aggregation import RelevanceAggregator
from lightning_pfl.functional.relevance import FixedMatrix
from lightning_pfl.methods import Adapters, Method

__all__ = ["true_graph"]


def true_graph(adapters: Adapters, *, relations: Mapping[str, Mapping[str, float]], pull: float = 0.5) -> Method:
    """Ours with true relevance, all tasks of a client taken together: clients count by how related they are.

    Args:
        adapters: makes the adapters.
        relations: how related every client is to every other, by ids, 0 or more; a comparison gives it. A client
            without relatives keeps its own.
        pull: as of `lightning_pfl.methods.ours`.

    Example:
        >>> from lightning_pfl import CoLoRA
        >>> true_graph(CoLoRA, relations={"a": {"b": 1.0}, "b": {"a": 1.0}}).name
        'oracle'
    """
    others = {one: {two: weight for two, weight in row.items() if two != one} for one, row in relations.items()}
    return Method("oracle", RelevanceAggregator(FixedMatrix(others), pull=pull), (adapters(),))
