"""One client's model after a run: as a module, as a folder, with everybody's adapters; a newcomer's model too."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from safetensors.torch import save_file

from lightning_pfl.callbacks.colora import CoLoRA
from lightning_pfl.callbacks.federated import KeySource
from lightning_pfl.errors import FederationError
from lightning_pfl.federation._compat import callbacks_of
from lightning_pfl.federation.client import Client
from lightning_pfl.federation.client_strategy import ClientStrategy
from lightning_pfl.federation.experts import Experts
from lightning_pfl.federation.jobs import Job
from lightning_pfl.federation.plan import snapshot_for_newcomer
from lightning_pfl.federation.privacy import overlaid
from lightning_pfl.federation.rounds import Rounds
from lightning_pfl.federation.schedule import client_seed
from lightning_pfl.federation.turn import build_client, introduce_client
from lightning_pfl.functional.routing import Answering, Keys
from lightning_pfl.types import Assignment, Personalized, SharedTensors

__all__ = ["Newcomer", "experts", "export", "personalize", "personalize_new"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Newcomer:
    """A model for a client that took no part in training.

    Attributes:
        module: its model, in evaluation mode, with the others' mixture in it and its own adapter as it starts. An
            ordinary Trainer with the run's `CoLoRA` among its callbacks trains it further, after ``module.train()``.
        weights: how the mixture weighs the run's clients, by id; those that count nothing are left out. Empty where
            the rule knows no mixture for one client.
        notes: what there is to say of it; in the log, too.
    """

    module: L.LightningModule
    weights: Mapping[str, float]
    notes: Sequence[str] = ()


def personalize(
    rounds: Rounds, client_id: str, module: L.LightningModule, *, aggregated: bool = True
) -> L.LightningModule:
    """See `FederatedStrategy.personalize`."""
    _require_class(rounds, client_id, module)
    _, personal = _build(rounds, client_id, aggregated=aggregated)
    return personal


def experts(
    rounds: Rounds, client_id: str, module: L.LightningModule, *, aggregated: bool, answering: Answering
) -> Experts:
    """See `FederatedStrategy.experts`."""
    _require_class(rounds, client_id, module)
    trainer, personal = _build(rounds, client_id, aggregated=aggregated)
    callbacks, strategy, state = callbacks_of(trainer), trainer.strategy, rounds.state
    assert isinstance(strategy, ClientStrategy)
    source = next((callback for callback in callbacks if isinstance(callback, KeySource)), None)
    if source is None:
        raise FederationError(
            "Questions are sent to whoever trained on such ones, but nothing has gathered what clients' questions look "
            "like. Add `RoutingKeys(...)` to `Trainer(callbacks=...)` and train."
        )
    adapters = {}
    for owner, known in state.experts.items():
        answer = state.post.opened(owner, state.personalized[owner]).start if aggregated else None
        adapters[owner] = overlaid(SharedTensors(known.common), answer).common
    return Experts(
        personal,
        exchange=strategy.exchange_of(callbacks),
        source=source,
        client_id=client_id,
        adapters=adapters,
        keys={owner: Keys(known.keys) for owner, known in state.experts.items()},
        answering=answering,
    )


def personalize_new(rounds: Rounds, client: Client, *, seed: int) -> Newcomer:
    """See `FederatedStrategy.personalize_new`."""
    snapshot, file = snapshot_for_newcomer(rounds.plan, client, seed=seed)
    with file:
        own_seed = client_seed(seed, client.id)
        assignment = Assignment(client.id, rounds.round or 0)
        job = Job(assignment, TrainerFn.FITTING, "", state=None, seed=own_seed, num_threads=client.num_threads)
        with rounds.plan.settings.turn(seed=own_seed, num_threads=client.num_threads):
            trainer, module, update = introduce_client(snapshot, job)
    if client.num_examples is not None:
        update = replace(update, num_examples=client.num_examples)
    welcome = rounds.welcome(update)
    for note in welcome.notes:
        _LOG.info("Newcomer `%s`: %s", client.id, note)
    strategy = trainer.strategy
    assert isinstance(strategy, ClientStrategy)
    strategy.exchange_of(callbacks_of(trainer)).receive(module, welcome.personalized)
    return Newcomer(module.eval(), welcome.weights, tuple(welcome.notes))


def export(rounds: Rounds, client_id: str, path: Path) -> Path:
    """See `FederatedStrategy.export`."""
    trainer, module = _build(rounds, client_id)
    adapters = [callback for callback in callbacks_of(trainer) if isinstance(callback, CoLoRA)]
    if adapters:
        adapters[0].export(module, path, client=client_id, round=rounds.round)
    strategy = trainer.strategy
    assert isinstance(strategy, ClientStrategy)
    if strategy.share or not adapters:
        shared = strategy.exchange_of(callbacks_of(trainer)).upload(module)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {**shared.common.unpack(), **shared.same_architecture.unpack()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "shared_tensors.safetensors")
        about = {"client_id": client_id, "model": type(module).__name__, "share": list(strategy.share)}
        (path / "shared_tensors.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return path


def _require_class(rounds: Rounds, client_id: str, module: L.LightningModule) -> None:
    if rounds.plan.has_default_model(client_id) and type(module) is not rounds.plan.default_class:
        raise TypeError(
            f"Client `{client_id}` trained the module that was handed to the Trainer, a "
            f"{rounds.plan.default_class.__name__}, but here is a {type(module).__name__}. Pass a module of that class."
        )


def _build(rounds: Rounds, client_id: str, *, aggregated: bool = True) -> tuple[L.Trainer, L.LightningModule]:
    job = rounds.job(client_id, TrainerFn.FITTING, rounds.round or 0, count=False)
    if not aggregated:
        job = replace(job, assignment=replace(job.assignment, personalized=Personalized()))
    with rounds.plan.settings.turn(seed=job.seed, num_threads=job.num_threads):
        trainer, module = build_client(rounds.plan.snapshots[job.snapshot], job)
    return trainer, module.eval()
