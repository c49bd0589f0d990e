"""What the server can expect of a client's update, from what it knows before it comes."""

from __future__ import annotations

from lightning_pfl.aggregation.guard import Expectation
from lightning_pfl.federation.client import Client
from lightning_pfl.federation.plan import Plan
from lightning_pfl.federation.server_state import KnownExpert, ServerState
from lightning_pfl.types import Assignment, ClientUpdate, FlatTensors, SharedTensors

__all__ = ["expectation", "learn"]


def expectation(client: Client, assignment: Assignment, *, plan: Plan, state: ServerState) -> Expectation:
    """What a client's update must look like.

    Args:
        client: whose.
        assignment: what it was asked.
        plan: of the run; knows the models that are built before a client runs.
        state: knows what other clients' first accepted updates looked like.
    """
    sent = state.post.opened(client.id, assignment.personalized)
    sample = plan.samples.get(plan.snapshot_of[client.id])
    architecture, layouts = None, None
    if sample is not None:
        architecture = sample.architecture
        layouts = sample.shared.common.layout, sample.shared.same_architecture.layout
    elif client.id in state.layouts:
        architecture, common, bound = state.layouts[client.id]
        layouts = common, bound
    return Expectation(
        round=assignment.round,
        architecture=architecture,
        layouts=layouts,
        start=_start(None if sample is None else sample.shared, sent.start),
        sketch_size=state.sketch_size,
        keys_width=next((expert.keys.shape[1] for expert in state.experts.values()), None),
        counted=client.num_examples is not None,
    )


def learn(update: ClientUpdate, *, plan: Plan, state: ServerState) -> None:
    """Remember of an accepted update what could not be known before."""
    if plan.snapshot_of[update.client_id] not in plan.samples:
        known = update.architecture, update.shared.common.layout, update.shared.same_architecture.layout
        state.layouts.setdefault(update.client_id, known)
    if update.sketch is not None:
        state.sketch_size = update.sketch.numel()
    if update.keys is not None:
        state.experts[update.client_id] = KnownExpert(update.keys, update.shared.common)


def _start(built: SharedTensors | None, sent: SharedTensors | None) -> SharedTensors | None:
    """From where a client sets out: as its model is built, with what the server sends over it."""
    if built is None or sent is None:
        return sent if built is None else built
    return SharedTensors(_over(built.common, sent.common), _over(built.same_architecture, sent.same_architecture))


def _over(built: FlatTensors, sent: FlatTensors) -> FlatTensors:
    if sent.layout == built.layout:  # as a rule, and a copy per client would be most of what a small round costs
        return sent
    return FlatTensors.pack({**built.unpack(), **sent.unpack()})
