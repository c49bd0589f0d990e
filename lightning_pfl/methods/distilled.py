"""Methods whose clients learn from each other's predictions on a public set.

Clients teach each other where they predict among equally many classes. Language models of several families do so among
the offered answers of a public set of questions, whose exact likelihoods `candidate_log_probs` makes comparable; among
the tokens of a vocabulary only the models of one family meet. The reference code maps tokens of other vocabularies one
by one and adds the probabilities of other families' teachers to logits of the own family's before one softmax, which
are not on one scale.
"""

from __future__ import annotations

from lightning_pfl.aggregation import Distilled, FedAvg, LocalOnly, LowestLoss, MeanPredictions, PrototypeMeans
from lightning_pfl.callbacks.prototype_distillation import PrototypeDistillation
from lightning_pfl.callbacks.public_distillation import Logits, PublicDistillation
from lightning_pfl.callbacks.public_set import Batches
from lightning_pfl.callbacks.selective_transfer import Graded, SelectiveTransfer
from lightning_pfl.callbacks.two_adapters import SideBySide, TwoAdapters
from lightning_pfl.methods.method import Adapters, Method

__all__ = ["fedmkt", "perada", "takfl"]


def perada(
    adapters: Adapters,
    *,
    batches: Batches,
    logits: Logits,
    strength: float = 0.1,
    epochs: int = 1,
    lr: float = 1e-3,
    temperature: float = 1.0,
) -> Method:
    r"""PerAda: clients' personal adapters as Ditto's, pulled to a w that has learned the mean of clients' predictions.

    :math:`v_k = \arg\min_v F_k(v) + \frac{\lambda}{2} \lVert v - w^t \rVert^2`, and the server's :math:`w^t` is the
    mean of the clients' w, distilled on public data: :math:`\min_w D(z(w), \frac1N \sum_k z(w_k))`.

    The distillation takes place at the start of clients' turns (`lightning_pfl.callbacks.public_set` says why that is
    the same). The mean of the predictions counts clients alike, as the paper's; that of the adapters goes by examples,
    as all our baselines'.

    The authors' code penalises by lambda without the half, with 1 (0.1 on Office-Home): ``strength=2`` (0.2). It trains
    v on whole epochs before w, distils by 50 to 500 steps of Adam at 1e-5 to 1e-3 under a cosine schedule, at T = 1,
    in the first 5 to 30 rounds, and drops what has not improved accuracy on a validation set; here every batch gives v
    and w a step each, as in Ditto, and every round distils. The reference code takes one pass over 80 public samples,
    T = 2, without the factor T^2, and ``strength=0.002``.

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
    return Method("PerAda", Distilled(FedAvg(), MeanPredictions()), callbacks, passes=2.0)


def takfl(
    adapters: Adapters,
    *,
    batches: Batches,
    logits: Logits,
    epochs: int = 1,
    lr: float = 1e-3,
    temperature: float = 3.0,
    self_weight: float = 0.01,
    self_temperature: float = 20.0,
) -> Method:
    r"""TAKFL: FedAvg within an architecture, and what each architecture's ensemble teaches on public data is added.

    :math:`\theta \leftarrow \theta + \sum_m \lambda_m \tau_m`, with a task vector :math:`\tau_m` per architecture, each
    distilled from :math:`\theta` anew (`PrototypeDistillation`). It takes place at the start of clients' turns.

    The authors search the :math:`\lambda_m`, sum 1, on a validation set; here they are equal, as in the reference code.
    T = 3, T' = 20 and gamma = 0.01 are the values of the authors' script for images, which takes 5 epochs at 1e-5 with
    weight decay 5e-5 (texts: one epoch at 3e-5, gamma 0 to 1). In the reference code every task vector is a difference
    of two equal values, so its TAKFL is FedAvg.

    Args:
        adapters: makes the adapters.
        batches: the public set, ``module -> batches``.
        logits: ``(module, batch) -> [n, classes]``.
        epochs: passes over the public set per teacher and round.
        lr: of the distillation.
        temperature: T, of what is learned from a teacher.
        self_weight: gamma, of staying near the received adapter's own predictions.
        self_temperature: T', of that.

    Source:
        Morafah et al., NeurIPS 2024, arXiv:2409.18461.
    """
    distillation = PrototypeDistillation(
        batches,
        logits,
        epochs=epochs,
        lr=lr,
        temperature=temperature,
        self_weight=self_weight,
        self_temperature=self_temperature,
    )
    return Method("TAKFL", Distilled(FedAvg(), PrototypeMeans()), (adapters(), distillation))


def fedmkt(
    adapters: Adapters,
    *,
    batches: Batches,
    outputs: Graded,
    epochs: int = 1,
    lr: float = 1e-3,
    label_weight: float = 0.9,
) -> Method:
    r"""FedMKT: no adapter is exchanged; clients learn from each other where another one predicts public data better.

    Knowledge goes through a server's model: per public example it learns from the client with the lowest loss, if that
    is lower than its own, and clients learn from it where it is better than they are (`SelectiveTransfer`).

    The paper's server has a larger model than the clients; here, as in the reference code, each architecture has a
    model of its clients' size, which clients train for themselves at the start of their turns. The paper matches tokens
    of other vocabularies by least edit distance, and cuts predictions to the 128 likeliest tokens; here families meet
    among offered answers, whose likelihoods need neither. The authors' trainer weighs labels by 0.9 unless told
    otherwise, and chooses teachers by the mean loss of an example's tokens. The reference code learns from soft labels
    alone.

    Args:
        adapters: makes the adapters; nothing of them is sent.
        batches: the public set, ``module -> batches``, with labels.
        outputs: ``(module, batch) -> (losses [n], logits [n, classes])``.
        epochs: passes over the public set per round, of each of the two steps.
        lr: of both steps.
        label_weight: lambda, the labels' share of the loss.

    Source:
        Fan et al., COLING 2025, arXiv:2406.02224.
    """
    transfer = SelectiveTransfer(batches, outputs, epochs=epochs, lr=lr, label_weight=label_weight)
    return Method("FedMKT", Distilled(LocalOnly(), LowestLoss()), (adapters(keep=("*",)), transfer))
