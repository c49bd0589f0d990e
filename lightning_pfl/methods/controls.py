"""Controls: ours with one part off, and structure without exchange, so that a comparison tells what does what.

What has a frozen branch takes the gate of the method that it is compared with: `StaticGate` (the paper's),
``StaticGate(Additive())``, `InputGate` (the reference code's), `FixedGate`. The control of `ours`, which has none, is
`local_only`; that of `routed` is `routed_local`. `routed_with` lets the clients of any method answer as those of
`routed` do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from lightning_pfl.adapters import GatePolicy, StaticGate
from lightning_pfl.aggregation import (
    ConventionalMean,
    LocalOnly,
    MixtureAggregator,
    RelevanceAggregator,
    UniformAggregator,
)
from lightning_pfl.functional.controls import Alone, Shuffled
from lightning_pfl.functional.pulling import Towards
from lightning_pfl.functional.relevance import Softmax, TaskGraph, Uniform, WeightPolicy
from lightning_pfl.functional.routing import Answering, Blend
from lightning_pfl.methods.method import Adapters, Method
from lightning_pfl.methods.one_adapter import fedavg

__all__ = [
    "no_colora",
    "no_exchange",
    "oracle",
    "pulled_to_all",
    "random_bases",
    "routed_local",
    "routed_with",
    "shuffled",
    "unaligned",
    "uniform",
    "warm_started",
    "zero_global",
]


def no_exchange(adapters: Adapters, *, gate: GatePolicy | None = None) -> Method:
    """Control: all that `frozen_mixture` has but the others. Each client's G is its own last upload.

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


def warm_started(adapters: Adapters) -> Method:
    """Control: each client starts a round from the uniform mean of everybody's last upload; one adapter, no G.

    What `uniform` with a warm start does less its global branch. It differs from
    `fedavg` where clients have unequal numbers of examples or sit out rounds. `uniform` without a warm start is the
    mean in G alone.

    Args:
        adapters: makes the adapters.
    """
    rule = UniformAggregator(global_branch=False, warm_start=Uniform(include_self=True))
    return Method("FedAvg, warm start", rule, (adapters(),))


def uniform(adapters: Adapters, *, warm_start: bool = False, gate: GatePolicy | None = None) -> Method:
    """`frozen_mixture` with relevance off: G is the mean of the others.

    Args:
        adapters: makes the adapters.
        warm_start: whether L starts each round from everybody's mean.
        gate: None: `StaticGate()`.
    """
    rule = UniformAggregator(warm_start=Uniform(include_self=True) if warm_start else None)
    return Method("uniform" + (", warm start" if warm_start else ""), rule, (adapters(gate=gate or StaticGate()),))


def pulled_to_all(adapters: Adapters, *, pull: float = 0.5) -> Method:
    """Ours with relevance off: L is pulled towards everybody's mean.

    Args:
        adapters: makes the adapters.
        pull: as of `ours`.
    """
    rule = UniformAggregator(global_branch=False, warm_start=Towards(Uniform(), pull))
    return Method("pulled to all", rule, (adapters(),))


def routed_local(adapters: Adapters, *, answering: Answering | None = None) -> Method:
    """`routed` without exchange in training: adapters are trained alone, and afterwards every client holds them all.

    What `routed` gains over it is what clients learn from each other; what it gains over `local_only`, the routing.

    Args:
        adapters: makes the adapters.
        answering: as of `routed`.
    """
    return Method("local, routed", LocalOnly(), (adapters(),), answering=answering or Blend())


def routed_with(
    adapters: Adapters, *, of: Callable[[Adapters], Method] = fedavg, answering: Answering | None = None
) -> Method:
    """Another method's training; afterwards every client holds all adapters and answers as those of `routed` do.

    Tells whether the gain of `routed` is the routing's alone, which any method could have.

    Args:
        adapters: makes the adapters.
        of: the method, made of adapters alone. Its clients should send all that they answer with: of `ditto` and
            `fedsim`, say, it is the shared adapter that is held, not the personal one.
        answering: as of `routed`.

    Example:
        >>> from lightning_pfl.callbacks.colora import CoLoRA
        >>> routed_with(CoLoRA, of=pulled_to_all).name
        'pulled to all, routed'
    """
    method = of(adapters)
    return replace(method, name=f"{method.name}, routed", answering=answering or Blend())


def shuffled(adapters: Adapters, *, weights: WeightPolicy | None = None, pull: float = 0.5, seed: int = 0) -> Method:
    """Ours with random relevance: rows as concentrated as ours, given to the wrong clients.

    Args:
        adapters: makes the adapters.
        weights: as of `ours`.
        pull: as of `ours`.
        seed: of who is taken for whom.
    """
    rule = RelevanceAggregator(Shuffled(weights or Softmax(0.25), seed=seed), pull=pull)
    return Method("random relevance", rule, (adapters(),))


def oracle(adapters: Adapters, *, tasks: Mapping[str, Collection[str]], pull: float = 0.5) -> Method:
    """Ours with true relevance: clients count by how many tasks, or families of tasks, they share.

    Args:
        adapters: makes the adapters.
        tasks: per client.
        pull: as of `ours`.
    """
    return Method("oracle", RelevanceAggregator(TaskGraph(tasks), pull=pull), (adapters(),))


def unaligned(adapters: Adapters, *, weights: WeightPolicy | None = None, pull: float = 0.5) -> Method:
    """Ours without alignment: each model's bases are drawn for itself, so that P and Q mean something else in each.

    Args:
        adapters: makes the adapters; its ``aligned`` is overruled.
        weights: as of `ours`.
        pull: as of `ours`.
    """
    return Method("not aligned", RelevanceAggregator(weights, pull=pull), (adapters(aligned=None),))


def random_bases(adapters: Adapters) -> Method:
    """`local_only` on bases that are drawn at random, so that what alignment does for a client by itself is known.

    `unaligned` less this is what exchange does where P and Q mean something else in each model.

    Args:
        adapters: makes the adapters; its ``aligned`` is overruled.
    """
    return Method("local, random bases", LocalOnly(), (adapters(aligned=None),))


def no_colora(
    adapters: Adapters,
    *,
    weights: WeightPolicy | None = None,
    pull: float = 0.5,
    conventional: ConventionalMean | None = None,
) -> Method:
    """Ours without Co-LoRA: plain LoRA in all layers, pulled by relevance among clients of one architecture.

    Who is alone in its architecture keeps its own. It is what the reference code runs where all models are the same.

    Args:
        adapters: makes the adapters; its ``num_blocks`` and ``aligned`` are overruled.
        weights: as of `ours`.
        pull: as of `ours`.
        conventional: how A and B are averaged. None: factor by factor, as in the paper; ``ProductMean()``: what layers
            compute. P and Q of Co-LoRA layers need no choice: with A and B the same for all, their mean is both.
    """
    colora = adapters(num_blocks=0, aligned=None, private_layers=True)
    return Method("no Co-LoRA", RelevanceAggregator(weights, pull=pull, conventional=conventional), (colora,))
