"""Ours, the structure that the paper uses, and the paper's own setting of it."""

from __future__ import annotations

from lightning_pfl.adapters import GatePolicy, StaticGate
from lightning_pfl.aggregation import RelevanceAggregator
from lightning_pfl.functional.relevance import WeightPolicy
from lightning_pfl.functional.routing import Answering, Blend
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
    adapters: Adapters,
    *,
    weights: WeightPolicy | None = None,
    pull: float = 0.5,
    answering: Answering | None = None,
) -> Method:
    """Ours, and every question is answered with the adapters of those who trained on such questions.

    Training is that of `ours`. Every client holds all clients' adapters and keys of their questions. A question tells
    whose keys are near, and the mean of their adapters answers: one model call, with a mixture of its own. So a
    client answers its own questions with what its relatives know beside it, and the others' as they do. The control
    without exchange in training is `routed_local`; adapters that never met have no mean that is worth much.

    FedDPA's rule for test inputs is near to this: it weighs a client's two adapters by an input's likeness to its
    training data. Here there is one adapter per client, and those of all clients are weighed.

    Args:
        adapters: makes the adapters.
        weights: as of `ours`.
        pull: as of `ours`.
        answering: whose adapters answer. None: ``Blend()``; ``Nearest()`` takes one.

    Example:
        >>> from lightning_pfl.callbacks.colora import CoLoRA
        >>> routed(CoLoRA).answering
        Blend(reach=2.0, own=0.25)
    """
    rule = RelevanceAggregator(weights, pull=pull)
    return Method("ours, routed", rule, (adapters(),), answering=answering or Blend())


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
