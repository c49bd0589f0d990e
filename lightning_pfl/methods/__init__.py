r"""Published methods, and the controls that a comparison needs: one function each.

A method is a server rule and what goes into the clients' Trainer. Every function takes what makes the adapters, so that
all methods of a comparison train the same ones::

    adapters = functools.partial(CoLoRA, rank=32, num_blocks=4)
    method = ditto(adapters, strength=0.1)
    trainer = L.Trainer(callbacks=[*method.callbacks], strategy=FederatedStrategy(8, aggregator=method.aggregator))

Start at `Method`. Rooms: `one_adapter` (FedAvg and its kin), `two_adapters` (one to exchange, one to keep),
`distilled` (a public set), `ranks` (products and unequal ranks), `relevant` (ours and the paper's), `controls` (ours
with one part off, and structure without exchange).

In all methods P and Q of Co-LoRA layers are mixed over all clients, and A and B of conventional layers over clients of
one architecture. The reference code averages whole adapters within an architecture only, so its baselines exchange
nothing between architectures.

In all of them, too, what the server sends is what training goes on from. The reference code restores each client's
optimizer together with its own copy of the weights, which overwrites what was sent at the first step: there, methods
that exchange trained adapters (FedAvg, FedSim, FedDPA, the shared adapter of Ditto) come close to local training.
"Authors' code" means the code that a method's own authors have published, "reference code" that of Co-LoRA.
"""

from lightning_pfl.methods.controls import (
    no_colora,
    no_exchange,
    oracle,
    pulled_to_all,
    random_bases,
    routed_local,
    routed_with,
    shuffled,
    unaligned,
    uniform,
    warm_started,
    zero_global,
)
from lightning_pfl.methods.distilled import fedmkt, perada, takfl
from lightning_pfl.methods.method import Adapters, Method
from lightning_pfl.methods.one_adapter import fedavg, fedper, fedprox, local_only
from lightning_pfl.methods.ranks import flexlora, flora, hetlora
from lightning_pfl.methods.relevant import frozen_mixture, ours, paper, routed
from lightning_pfl.methods.two_adapters import ditto, feddat, feddpa, fedsim

__all__ = [
    "Adapters",
    "Method",
    "ditto",
    "fedavg",
    "feddat",
    "feddpa",
    "fedmkt",
    "fedper",
    "fedprox",
    "fedsim",
    "flexlora",
    "flora",
    "frozen_mixture",
    "hetlora",
    "local_only",
    "no_colora",
    "no_exchange",
    "oracle",
    "ours",
    "paper",
    "perada",
    "pulled_to_all",
    "random_bases",
    "routed",
    "routed_local",
    "routed_with",
    "shuffled",
    "takfl",
    "unaligned",
    "uniform",
    "warm_started",
    "zero_global",
]
