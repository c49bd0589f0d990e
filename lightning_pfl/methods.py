r"""Published methods, and the controls that a comparison needs: one function each.

A method is a server rule and what goes into the clients' Trainer. Every function takes what makes the adapters, so that
all methods of a comparison train the same ones::

    adapters = functools.partial(CoLoRA, rank=16, alpha=32, num_blocks=4)
    method = ditto(adapters, strength=0.1)
    trainer = L.Trainer(callbacks=[*method.callbacks], strategy=FederatedStrategy(8, aggregator=method.aggregator))

Start at `Method`; then come baselines without exchange, one adapter, two adapters, products, ours, and ours with one
part off. In all of them P and Q of Co-LoRA layers are mixed over all clients, and A and B of conventional layers over
clients of one architecture. The reference code averages whole adapters within an architecture only, so its baselines
exchange nothing between architectures.

In all of them, too, what the server sends is what training goes on from. The reference code restores each client's
optimizer together with its own copy of the weights, which overwrites what was sent at the first step: there, methods
that exchange trained adapters (FedAvg, FedSim, FedDPA, the shared adapter of Ditto) come close to local training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import lightning as L
from torch import Tensor

from lightning_pfl.adapters import FixedGate, GatePolicy, StaticGate
from lightning_pfl.aggregation import (
    Aggregator,
    FedAvg,
    LocalOnly,
    MixtureAggregator,
    ProductMean,
    RelevanceAggregator,
    UniformAggregator,
)
from lightning_pfl.callbacks.colora import CoLoRA
from lightning_pfl.callbacks.mutual_teachers import MutualTeachers, Outputs
from lightning_pfl.callbacks.proximal import Proximal
from lightning_pfl.callbacks.public_distillation import PublicDistillation
from lightning_pfl.callbacks.rank_limit import RankLimit
from lightning_pfl.callbacks.two_adapters import OneAfterOther, SideBySide, Together, TwoAdapters
from lightning_pfl.functional.controls import Alone, Shuffled
from lightning_pfl.functional.relevance import Softmax, TaskGraph, Uniform, WeightPolicy

__all__ = [
    "Adapters",
    "Method",
    "ditto",
    "fedavg",
    "feddat",
    "feddpa",
    "fedper",
    "fedprox",
    "fedsim",
    "flexlora",
    "hetlora",
    "local_only",
    "no_exchange",
    "oracle",
    "ours",
    "paper",
    "perada",
    "shuffled",
    "unaligned",
    "uniform",
    "warm_started",
    "zero_global",
]

Adapters = Callable[..., CoLoRA]
"""`CoLoRA`, or a `functools.partial` of it; called with those arguments that a method must choose itself."""


@final
@dataclass(frozen=True, eq=False)
class Method:
    """A method, ready for a Trainer.

    Attributes:
        name: as in tables.
        aggregator: for `FederatedStrategy`.
        callbacks: for the Trainer, in this order; a method that weighs clients by relevance needs a `RelevanceProbe`
            beside them (``aggregator.needs_sketches``).
        passes: forward and backward passes per optimizer step, relative to local training, for comparisons at equal
            compute.
    """

    name: str
    aggregator: Aggregator
    callbacks: tuple[L.Callback, ...]
    passes: float = 1.0


# -- without exchange --------------------------------------------------------------------------------------------------


def local_only(adapters: Adapters) -> Method:
    """Each client trains one adapter at full scale on its own data: supervised fine-tuning, what all have to beat.

    The reference code's ``sft``. It computes a mean there and ignores it; here nothing is sent.

    Args:
        adapters: makes the adapters.

    Example:
        >>> local_only(CoLoRA).aggregator.uses_global_branch
        False
    """
    return Method("local only", LocalOnly(), (adapters(),))


def no_exchange(adapters: Adapters, *, gate: GatePolicy | None = None) -> Method:
    """Control: all that `ours` has but the others. Each client's G is its own last upload.

    What this gains over `local_only` is what branch and gate do, not what clients learn from each other.

    Args:
        adapters: makes the adapters.
        gate: None: `StaticGate()`.
    """
    return Method("no exchange", MixtureAggregator(Alone()), (adapters(gate=gate or StaticGate()),))


def zero_global(adapters: Adapters, *, gate: GatePolicy | None = None) -> Method:
    """Control: a global branch to which nothing is ever sent, so that its output is 0. The gate only scales L.

    Args:
        adapters: makes the adapters.
        gate: None: `StaticGate()`.
    """
    return Method("G = 0", LocalOnly(global_branch=True), (adapters(gate=gate or StaticGate()),))


# -- one adapter -------------------------------------------------------------------------------------------------------


def fedavg(adapters: Adapters) -> Method:
    r"""FedAvg of adapters, also known as FedIT: :math:`w^{t+1} = \sum_k \frac{n_k}{n} w_k^{t+1}`, and all start there.

    Evaluated after aggregation (``val_loss``) it is one model for all; a client's model after its local training is
    ``val_loss_local``, which is what the reference code calls its score.

    The reference code weighs clients alike; here, as in both papers, by their numbers of examples.

    Args:
        adapters: makes the adapters.

    Source:
        McMahan et al., AISTATS 2017, arXiv:1602.05629; of LoRA: Zhang et al. (FedIT), ICASSP 2024, arXiv:2305.05644.
    """
    return Method("FedAvg", FedAvg(), (adapters(),))


def warm_started(adapters: Adapters) -> Method:
    """Control: each client starts a round from the uniform mean of everybody's last upload; one adapter, no G.

    FedAvg in the terms of `ours`: what `uniform` with a warm start does less its global branch. It differs from
    `fedavg` where clients have unequal numbers of examples or sit out rounds.

    Args:
        adapters: makes the adapters.
    """
    rule = UniformAggregator(global_branch=False, warm_start=Uniform(include_self=True))
    return Method("FedAvg, warm start", rule, (adapters(),))


def fedprox(adapters: Adapters, *, strength: float = 0.01) -> Method:
    r"""FedProx: clients minimise :math:`F_k(w) + \frac{\mu}{2} \lVert w - w^t \rVert^2`, the server averages as FedAvg.

    Clients do equal local work here, so of the paper's two ideas (the other is partial work, with which a turn of fewer
    ``local_steps`` agrees) the proximal term is what differs from `fedavg`. The reference code has no FedProx.

    Args:
        adapters: makes the adapters.
        strength: mu; the paper tries 0.001 to 1.

    Source:
        Li et al., MLSys 2020, arXiv:1812.06127.
    """
    return Method("FedProx", FedAvg(), (adapters(), Proximal(strength)))


def fedper(adapters: Adapters, *, keep: Sequence[str]) -> Method:
    """FedPer: base layers are averaged as by FedAvg, personalisation layers stay with their client.

    Both are trained together, in the same steps, and what is kept is never sent. A head in `CoLoRA`'s ``train_also`` is
    kept without being named. The reference code has no FedPer.

    Args:
        adapters: makes the adapters.
        keep: `CoLoRA`'s ``keep``: which adapters stay, by exchange names, such as those of the last block
            (``["main/3/*"]``). Empty: only what `train_also` trains is private.

    Source:
        Arivazhagan et al., arXiv:1912.00818, algorithm 1.
    """
    return Method("FedPer", FedAvg(), (adapters(keep=tuple(keep)),))


# -- two adapters ------------------------------------------------------------------------------------------------------


def ditto(adapters: Adapters, *, strength: float = 0.1) -> Method:
    r"""Ditto: w is FedAvg's, and each client keeps :math:`v_k = \arg\min_v F_k(v) + \frac{\lambda}{2} \lVert v - w^t
    \rVert^2`, which is its model.

    Each batch gives w and v a step each; v is pulled to w as it was received, :math:`v \leftarrow v - \eta (\nabla
    F_k(v) + \lambda (v - w^t))`.

    The reference code also averages v (since one of its refactorings), masked by the restore described above; and its
    penalty is :math:`0.001 \lVert v - w^t \rVert^2`, that is ``strength=0.002``.

    Args:
        adapters: makes the adapters.
        strength: lambda; the paper tries 0.05, 0.1, 0.2, 1 and 2.

    Source:
        Li et al., ICML 2021, arXiv:2012.04221, algorithm 1.
    """
    return Method("Ditto", FedAvg(), (adapters(), TwoAdapters(SideBySide(strength=strength))), passes=2.0)


def fedsim(adapters: Adapters) -> Method:
    r"""FedSim: shared u and personal v are parts of one model, :math:`W x + \Delta_u x + \Delta_v x`, trained together.

    :math:`(u, v) \leftarrow (u, v) - \eta \nabla F_k(u, v)`, and the server averages u.

    The paper leaves open which parts of a model are personal. The reference code sums the *logits* of two full passes,
    and so needs two models to generate; here both are adapters of one model, as in the paper's adapter variant, and
    cost one pass.

    Args:
        adapters: makes the adapters.

    Source:
        Pillutla et al., ICML 2022, arXiv:2204.03809, algorithm "FedSim".
    """
    return Method("FedSim", FedAvg(), (adapters(), TwoAdapters(Together())))


def feddpa(adapters: Adapters, *, weight: float = 0.5) -> Method:
    r"""FedDPA-T: a global adapter for what all share, then a local one beside it, :math:`W x + \beta \Delta_G x +
    (1 - \beta) \Delta_L x`.

    The first half of a turn's steps trains G alone, which is what is sent; the second trains L with G frozen as it is
    by then. In evaluation after aggregation, G is the mean.

    The paper weighs the two anew for each test input, by how much it resembles the client's training data; here beta is
    one number, as in the reference code while it trains. The reference code crashes if a turn has an odd number of
    steps; here G takes the smaller half.

    Args:
        adapters: makes the adapters.
        weight: beta, of the global adapter.

    Source:
        Yang et al., NeurIPS 2024, arXiv:2403.19211.
    """
    colora = adapters(gate=FixedGate(value=weight))
    return Method("FedDPA", FedAvg(global_branch=True), (colora, TwoAdapters(OneAfterOther())))


def feddat(
    adapters: Adapters, *, outputs: Outputs, alpha: float = 1.0, beta: float = 1.0, temperature: float = 2.0
) -> Method:
    r"""FedDAT: a shared adapter s and a dual-adapter teacher, :math:`\frac12 (\Delta_{\hat s} + \Delta_c)`, teach each
    other.

    :math:`\hat s` is the shared adapter as it was received, frozen; c the client's own; s is trained from
    :math:`\hat s` and sent. The losses stand at `MutualTeachers`. The client's model is the dual one.

    The reference code halves all losses and makes another pass for the teacher's logits; here each model makes one
    pass, whose logits teach the other. With Adam the factor changes nothing.

    Args:
        adapters: makes the adapters.
        outputs: a batch's loss and logits, ``[n, classes]``; it stands in for ``training_step``.
        alpha: how much s listens to the dual teacher.
        beta: how much the dual one listens to s.
        temperature: of both.

    Source:
        Chen et al., AAAI 2024, arXiv:2308.12305.
    """
    training = MutualTeachers(outputs=outputs, alpha=alpha, beta=beta, temperature=temperature)
    callbacks = (adapters(gate=FixedGate()), TwoAdapters(training))
    return Method("FedDAT", FedAvg(global_branch=True), callbacks, passes=2.0)


def perada(
    adapters: Adapters,
    *,
    batches: Callable[[Any], Sequence[Any]],
    logits: Callable[[Any, Any], Tensor],
    strength: float = 0.1,
    epochs: int = 1,
    lr: float = 1e-3,
    temperature: float = 2.0,
) -> Method:
    r"""PerAda: clients' personal adapters as Ditto's, pulled to a w that has learned the mean of clients' predictions.

    :math:`v_k = \arg\min_v F_k(v) + \frac{\lambda}{2} \lVert v - w^t \rVert^2`, and the server's :math:`w^t` is the
    mean of the clients' w, distilled on public data: :math:`\min_w D(z(w), \frac1N \sum_k z(w_k))`.

    The distillation takes place at the start of clients' turns (`PublicDistillation` says why that is the same). The
    mean of the predictions, as that of the adapters, is weighed by examples.

    The reference code adds probabilities of other families' teachers to logits of the own family's before one softmax,
    which are not on one scale; here families with other vocabularies do not teach each other. It takes one pass over
    80 public samples, T = 2, without the factor T^2, and its penalty is ``strength=0.002``.

    Args:
        adapters: makes the adapters.
        batches: the public set, ``module -> batches``.
        logits: ``(module, batch) -> [n, classes]``.
        strength: lambda.
        epochs: passes over the public set per round.
        lr: of the distillation.
        temperature: of the distillation.

    Source:
        Xie et al., CVPR 2024, arXiv:2302.06637, algorithm 1.
    """
    distillation = PublicDistillation(batches, logits, epochs=epochs, lr=lr, temperature=temperature)
    callbacks = (adapters(), distillation, TwoAdapters(SideBySide(strength=strength)))
    return Method("PerAda", FedAvg(), callbacks, passes=2.0)


# -- products ----------------------------------------------------------------------------------------------------------


def flexlora(adapters: Adapters) -> Method:
    r"""FlexLoRA: the server averages what layers compute, :math:`\sum_k \frac{n_k}{n} B_k A_k`, and cuts it to a rank.

    P and Q, whose bases are the same for all, are averaged as they are, which is the same as averaging the products.
    The paper forms the whole matrix and takes its SVD; here the same SVD comes from QR of the stacked factors, and
    factors are given near the old A (`ProductMean`), which trains on from B = 0. Clients have one rank. The reference
    code has no FlexLoRA.

    Args:
        adapters: makes the adapters.

    Source:
        Bai et al., NeurIPS 2024, arXiv:2402.11505.
    """
    return Method("FlexLoRA", FedAvg(conventional=ProductMean()), (adapters(),))


def hetlora(adapters: Adapters, *, ranks: Mapping[str, int]) -> Method:
    r"""HETLoRA without self-pruning: clients of unequal rank, zero-padded adapters averaged by their norms.

    Client k trains the first r_k ranks, :math:`w^{t+1} = \sum_k s_k w_k / \sum_k s_k` with :math:`s_k = \lVert B_k A_k
    \rVert_F`, and it receives the mean cut to r_k.

    The paper also lets clients prune their rank while they train (a penalty on the last ranks, which are cut once they
    are small); here ranks stay as given, its setting gamma = 1. The reference code has no HETLoRA.

    Args:
        adapters: makes the adapters, of the largest rank.
        ranks: r_k by client id.

    Source:
        Cho et al., EMNLP 2024, arXiv:2401.06432.
    """
    return Method("HETLoRA", FedAvg(by_norm=True), (adapters(), RankLimit(ranks)))


# -- ours, and ours with one part off ----------------------------------------------------------------------------------


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
        >>> ours(CoLoRA).aggregator.needs_sketches
        True
    """
    rule = RelevanceAggregator(weights, warm_start=warm_start)
    return Method("ours", rule, (adapters(gate=gate or StaticGate()),))


def paper(adapters: Adapters) -> Method:
    """The paper's own setting: plain cosines at temperature 0.5 over the others, a static gate, no warm start.

    The reference code has a gate that reads its input, with noise (`InputGate` without the noise), and compares
    sketches column by column (`ColumnCosine`).

    Args:
        adapters: makes the adapters; for the paper's alignment, ``aligned=align(..., rule=LeastSquares(...))``.

    Source:
        Co-LoRA, arXiv:2506.11024.
    """
    rule = RelevanceAggregator(Softmax(0.5, standardize=False), ema=0.5)
    return Method("the paper's", rule, (adapters(gate=StaticGate()),))


def uniform(adapters: Adapters, *, warm_start: bool = False, gate: GatePolicy | None = None) -> Method:
    """Ours with relevance off: G is the mean of the others.

    Args:
        adapters: makes the adapters.
        warm_start: whether L starts each round from everybody's mean.
        gate: None: `StaticGate()`.
    """
    rule = UniformAggregator(warm_start=Uniform(include_self=True) if warm_start else None)
    return Method("uniform" + (", warm start" if warm_start else ""), rule, (adapters(gate=gate or StaticGate()),))


def shuffled(
    adapters: Adapters, *, weights: WeightPolicy | None = None, gate: GatePolicy | None = None, seed: int = 0
) -> Method:
    """Ours with random relevance: rows as concentrated as ours, given to the wrong clients.

    Args:
        adapters: makes the adapters.
        weights: as of `ours`.
        gate: None: `StaticGate()`.
        seed: of who is taken for whom.
    """
    rule = RelevanceAggregator(Shuffled(weights or Softmax(), seed=seed))
    return Method("random relevance", rule, (adapters(gate=gate or StaticGate()),))


def oracle(adapters: Adapters, *, tasks: Mapping[str, Collection[str]], gate: GatePolicy | None = None) -> Method:
    """Ours with true relevance: clients count by how many tasks, or families of tasks, they share.

    Args:
        adapters: makes the adapters.
        tasks: per client.
        gate: None: `StaticGate()`.
    """
    return Method("oracle", MixtureAggregator(TaskGraph(tasks)), (adapters(gate=gate or StaticGate()),))


def unaligned(adapters: Adapters, *, weights: WeightPolicy | None = None, gate: GatePolicy | None = None) -> Method:
    """Ours without alignment: each model's bases are drawn for itself, so that P and Q mean something else in each.

    Args:
        adapters: makes the adapters; its ``aligned`` is overruled.
        weights: as of `ours`.
        gate: None: `StaticGate()`.
    """
    rule = RelevanceAggregator(weights)
    return Method("not aligned", rule, (adapters(gate=gate or StaticGate(), aligned=None),))
