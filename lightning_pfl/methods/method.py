"""`Method`: a server rule and the clients' callbacks, ready for a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import lightning as L

from lightning_pfl.aggregation import Aggregator
from lightning_pfl.callbacks.colora import CoLoRA
from lightning_pfl.functional.routing import Answering

__all__ = ["Adapters", "Method"]

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
            compute. Passes over a public set come on top.
        answering: None: a client's own model answers. Else each question is answered with the adapters of those who
            trained on such questions (`FederatedStrategy.experts`, which takes it); a `RoutingKeys` belongs beside the
            callbacks then.
    """

    name: str
    aggregator: Aggregator
    callbacks: tuple[L.Callback, ...]
    passes: float = 1.0
    answering: Answering | None = None
