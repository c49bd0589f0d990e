"""Methods whose clients train one adapter that they exchange and one that they keep."""

from __future__ import annotations

from lightning_pfl.adapters import FixedGate
from lightning_pfl.aggregation import FedAvg
from lightning_pfl.callbacks.mutual_teachers import MutualTeachers, Outputs
from lightning_pfl.callbacks.two_adapters import OneAfterOther, SideBySide, Together, TwoAdapters
from lightning_pfl.methods.method import Adapters, Method

__all__ = ["ditto", "feddat", "feddpa", "fedsim"]


def ditto(adapters: Adapters, *, strength: float = 0.1) -> Method:
    r"""Ditto: w is FedAvg's, and each client keeps :math:`v_k = \arg\min_v F_k(v) + \frac{\lambda}{2} \lVert v - w^t
    \rVert^2`, which is its model.

    Each batch gives w and v a step each, as in the authors' code; v is pulled to w as it was received, :math:`v
    \leftarrow v - \eta (\nabla F_k(v) + \lambda (v - w^t))`.

    The reference code also averages v (since one of its refactorings), masked by the restore described above; and its
    penalty is :math:`0.001 \lVert v - w^t \rVert^2`, that is ``strength=0.002``.

    Args:
        adapters: makes the adapters.
        strength: lambda; the authors' scripts take 1, and their choice by validation tries 0.1, 1 and 2.

    Source:
        Li et al., ICML 2021, arXiv:2012.04221, algorithm 1.
    """
    return Method("Ditto", FedAvg(), (adapters(), TwoAdapters(SideBySide(strength=strength))), passes=2.0)


def fedsim(adapters: Adapters) -> Method:
    r"""FedSim: shared u and personal v are parts of one model, :math:`W x + \Delta_u x + \Delta_v x`, trained together.

    :math:`(u, v) \leftarrow (u, v) - \eta \nabla F_k(u, v)`, and the server averages u. The authors' code trains both
    with one optimizer.

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
    r"""FedDPA-T: a global adapter for what all share, and a local one beside it, :math:`W x + \beta \Delta_G x +
    (1 - \beta) \Delta_L x`.

    In every round a client first trains L beside the G that it has received, frozen, and then G alone, which is what is
    sent; in round 0 there is no mean yet and only G is trained. So the authors' code has it, with whole epochs for
    either; here each takes half of a turn's steps, L the smaller half. In evaluation G is the mean.

    The paper weighs the two anew for each test input, by how much it resembles the client's training data; here beta is
    one number, as in the authors' code while it trains. The reference code trains G first and then L beside the trained
    G, and crashes if a turn has an odd number of steps.

    Args:
        adapters: makes the adapters.
        weight: beta, of the global adapter; the authors' code takes 0.5.

    Source:
        Yang et al., NeurIPS 2024, arXiv:2403.19211.
    """
    colora = adapters(gate=FixedGate(value=weight))
    return Method("FedDPA", FedAvg(global_branch=True), (colora, TwoAdapters(OneAfterOther())))


def feddat(
    adapters: Adapters, *, outputs: Outputs, alpha: float = 1.0, beta: float = 1.0, temperature: float = 3.0
) -> Method:
    r"""FedDAT: a shared adapter s and a dual-adapter teacher, :math:`\frac12 (\Delta_{\hat s} + \Delta_c)`, teach each
    other.

    :math:`\hat s` is the shared adapter as it was received, frozen; c the client's own; s is trained from
    :math:`\hat s` and sent. The losses stand at `MutualTeachers`. The client's model is the dual one.

    The authors' code takes T = 3, both weights 1 and half of each sum, and steps s before it computes the dual model's
    loss, which does not depend on s; the reference code takes T = 2. Both make another pass for the teacher's logits;
    here each model makes one pass, whose logits teach the other. With Adam the factor changes nothing.

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
