"""Ours, the structure that the paper uses, and the paper's own setting of it."""

from __future__ import annotations

from lightning_pfl.adapters import GatePolicy, StaticGate
from lightning_pfl.aggregation import RelevanceAggregator
from lightning_pfl.functional.relevance import WeightPolicy
from lightning_pfl.methods.method import Adapters, Method

__all__ = ["frozen_mixture", "ours", "paper", "routed"]


def ours(adapters: Adapters, *, weights: WeightPolicy | None = None, pull: float = 0.5) -> Method:
    r"""Co-LoRA with relevance: after a round, :math:`L_i \leftarrow (1 - a) L_i + a \sum_j w_{ij} L_j`.

    Args:
        adapters: makes the adapters.
        weights: how rows are made of cosines. None: ``Softmax(0.25)``, row-standardised.
        pull: a.

    Example:
        >>> from lightning_pfl.callbacks.colora import CoLoRA
        >>> ours(CoLoRA).aggregator.uses_global_branch
        False
    """
    return Method("ours", RelevanceAggregator(weights, pull=pull), (adapters(),))


def routed(
    adapters: Adapters, *, weights: WeightPolicy | None = None, pull: float = 0.5, margin: float = 1.5
) -> Method:
    """Ours, and every question is answered with the adapter of whoever trained on such questions.

    Training is that of `ours`. Every client holds all clients' adapters and keys of their questions, and asks its own
    one unless another's keys are much nearer to the question: so it keeps what it has gained on its own tasks, and
    answers the others' tasks as they do. Its control without exchange in training is `routed_local`.

    FedDPA's rule for test inputs is near to this: it weighs a client's two adapters by an input's likeness to its
    training data. Here there is one adapter per client, and one of them answers.

    Args:
        adapters: makes the adapters.
        weights: as of `ours`.
        pull: as of `ours`.
        margin: how many times the distance of the nearest owner the own one may be and still answer; 1: no preference.

    Example:
        >>> from lightning_pfl.callbacks.colora import CoLoRA
        >>> routed(CoLoRA).margin
        1.5
    """
    return Method("ours, routed", RelevanceAggregator(weights, pull=pull), (adapters(),), margin=margin)


def frozen_mixture(
    adapters: Adapters,
    *,
    weights: WeightPolicy | None = None,
    pull: float = 0.0,
    gate: GatePolicy | None = None,
) -> Method:
    r"""The paper's structure under our rows: :math:`G_i = \sum_j w_{ij} L_j` frozen beside L, weighed by a gate.

    Args:
        adapters: makes the adapters.
        weights: how rows are made of cosines. None: ``Softmax(0.25)``, row-standardised.
        pull: how far L is pulled besides.
        gate: None: `StaticGate()`.
    """
    rule = RelevanceAggregator(weights, pull=pull, global_branch=True)
    name = "frozen mixture" + (", pulled" if pull else "")
    return Method(name, rule, (adapters(gate=gate or StaticGate()),))


def paper(adapters: Adapters, *, include_self: bool = False) -> Method:
    """The paper's own setting: plain cosines at temperature 0.5, a static gate, G frozen, L never touched, EMA 0.5.

    The paper's sum runs over the clients; the reference code leaves the client itself out, which is what is done here
    unless asked. The reference code also has a gate that reads its input, with noise (`InputGate` without the noise),
    and compares sketches column by column (`ColumnCosine`).

    Args:
        adapters: makes the adapters; for the paper's alignment, ``aligned=align(..., rule=LeastSquares(...))``.
        include_self: whether a client's own upload is in its mixture.

    Source:
        Co-LoRA, arXiv:2506.11024.
    """
    rule = RelevanceAggregator.paper(include_self=include_self)
    return Method("the paper's", rule, (adapters(gate=StaticGate()),))
