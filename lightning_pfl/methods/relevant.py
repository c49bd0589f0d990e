"""Ours, and the paper's own setting of it."""

from __future__ import annotations

from lightning_pfl.adapters import GatePolicy, StaticGate
from lightning_pfl.aggregation import RelevanceAggregator
from lightning_pfl.functional.relevance import Softmax, WeightPolicy
from lightning_pfl.methods.method import Adapters, Method

__all__ = ["ours", "paper"]


def ours(
    adapters: Adapters,
    *,
    weights: WeightPolicy | None = None,
    warm_start: WeightPolicy | None = None,
    gate: GatePolicy | None = None,
) -> Method:
    r"""Co-LoRA with relevance: :math:`G_i = \sum_j w_{ij} L_j` beside the client's own L, weighed by a gate.

    Args:
        adapters: makes the adapters.
        weights: how rows are made of cosines. None: `Softmax()`, row-standardised.
        warm_start: what L starts a round from. None: from itself.
        gate: None: `StaticGate()`.

    Example:
        >>> from lightning_pfl.callbacks.colora import CoLoRA
        >>> ours(CoLoRA).aggregator.needs_sketches
        True
    """
    rule = RelevanceAggregator(weights, warm_start=warm_start)
    return Method("ours", rule, (adapters(gate=gate or StaticGate()),))


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
    rule = RelevanceAggregator(Softmax(0.5, standardize=False, include_self=include_self), ema=0.5)
    return Method("the paper's", rule, (adapters(gate=StaticGate()),))
