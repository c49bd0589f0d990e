"""`Distilled`: another rule mixes the adapters, and beside it clients teach each other on public data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from lightning_pfl.aggregation.base import Aggregator
from lightning_pfl.aggregation.ensembles import Ensemble, Predictions
from lightning_pfl.aggregation.memory import require_rule
from lightning_pfl.functional.averaging import select
from lightning_pfl.functional.distillation import PUBLIC
from lightning_pfl.types import Aggregation, ClientUpdate, FlatTensors, Personalized, SharedTensors

__all__ = ["Distilled"]

_RULE = "distilled"


@final
class Distilled(Aggregator):
    """Takes clients' predictions on public data out of what they send, and sends what an `Ensemble` makes of them.

    A client receives tensors by the names under which it sends its own: whoever predicts among as many classes. What
    is taught is made of the round's participants' predictions and sent to everybody; where nobody who took part
    predicts what a client predicts, nothing is sent to it, and it learns nothing from the public set in its next turn.

    Args:
        rule: what mixes the adapters. Its guard is this rule's.
        ensemble: what makes teachers of predictions.

    Example:
        >>> import torch
        >>> from lightning_pfl.aggregation import FedAvg, MeanPredictions
        >>> logits = {"a": torch.tensor([[1.0]]), "b": torch.tensor([[3.0]])}
        >>> told = {name: FlatTensors.pack({"public/1/logits": z}) for name, z in logits.items()}
        >>> updates = [ClientUpdate(name, 0, 1, "tiny", SharedTensors(flat)) for name, flat in told.items()]
        >>> Distilled(FedAvg(), MeanPredictions()).aggregate(updates, {}).personalized["a"].start.common.unpack()
        {'public/1/logits': tensor([[2.]])}
    """

    def __init__(self, rule: Aggregator, ensemble: Ensemble) -> None:
        self.rule = rule
        self.ensemble = ensemble
        self.guard = rule.guard
        self.conventional = rule.conventional

    @property
    def uses_global_branch(self) -> bool:
        """As the other rule."""
        return self.rule.uses_global_branch

    @property
    def needs_sketches(self) -> bool:
        """As the other rule."""
        return self.rule.needs_sketches

    def aggregate(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any]) -> Aggregation:
        """Mix the adapters by the other rule, and teach."""
        require_rule(state, _RULE)
        accepted = self.guard.accept(updates)
        told = [
            Predictions(one.client_id, one.architecture, _public(one.shared.common))
            for one in sorted(accepted, key=lambda one: one.client_id)
        ]
        names = {**state.get("names", {}), **{one.client_id: sorted(one.tensors) for one in told}}
        mixed = self.rule.aggregate([_bare(one) for one in accepted], state.get("of", {}))
        taught = self.ensemble.teach(told)
        return replace(
            mixed,
            personalized={
                client: _with(sent, {name: taught[name] for name in names.get(client, ()) if name in taught})
                for client, sent in mixed.personalized.items()
            },
            state={"rule": _RULE, "of": mixed.state, "names": names},
        )

    def center(self, updates: Sequence[ClientUpdate]) -> SharedTensors:
        """The other rule's, of the adapters alone."""
        return self.rule.center([_bare(one) for one in updates])


def _public(flat: FlatTensors) -> dict[str, Any]:
    return {name.removeprefix(PUBLIC): value for name, value in flat.unpack().items() if name.startswith(PUBLIC)}


def _bare(update: ClientUpdate) -> ClientUpdate:
    """An update without predictions."""
    kept = [name for name in update.shared.common.layout.names if not name.startswith(PUBLIC)]
    return replace(update, shared=replace(update.shared, common=select(update.shared.common, kept)))


def _with(sent: Personalized, taught: Mapping[str, Any]) -> Personalized:
    """What a client receives, and what it is taught."""
    if not taught:
        return sent
    start = sent.start or SharedTensors()
    lessons = {f"{PUBLIC}{name}": tensor for name, tensor in taught.items()}
    return replace(sent, start=replace(start, common=FlatTensors.pack({**start.common.unpack(), **lessons})))
