"""`Plan`: what a run is made of before anything runs. Models are built, adapters placed, snapshots taken.

Each distinct model (the module handed to the Trainer, and each `Client(model=...)`) becomes one snapshot, from which
all turns of its clients start. A module that builds its layers in ``configure_model`` or ``setup`` goes into the
snapshot unbuilt, since it may build them by ``client_id``; the driver builds a copy for itself, with ``client_id``
None.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import lightning as L
import numpy as np
import torch
from torch import Tensor

from lightning_pfl.callbacks.federated import Exchange, FederatedCallback
from lightning_pfl.federation import random_state
from lightning_pfl.federation._compat import attach_datamodule, is_overridden
from lightning_pfl.federation.checks import require_lightning
from lightning_pfl.federation.client import Client
from lightning_pfl.federation.fingerprint import Fingerprint
from lightning_pfl.federation.pools.isolation import ProcessSettings
from lightning_pfl.federation.schedule import client_seed
from lightning_pfl.federation.sharing import JointExchange
from lightning_pfl.federation.snapshot import Snapshot
from lightning_pfl.federation.sources import ClientData, pack_datamodule
from lightning_pfl.federation.tensor_file import TensorFile
from lightning_pfl.types import ClientUpdate

__all__ = ["Plan", "make_plan", "snapshot_for_newcomer"]

_DEFAULT = "the default model"


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """A run, ready to start.

    Attributes:
        clients: all.
        snapshots: what turns start from.
        snapshot_of: which of them, by client id.
        fingerprints: of each snapshot's model.
        validating: who has validation data.
        samples: what a client of each model would send, by snapshot, where that is known before it runs.
        file: where the snapshots' big tensors lie.
        settings: of this process, for turns that run in it.
        default_class: of the module that was handed to the Trainer.
    """

    clients: tuple[Client, ...]
    snapshots: Mapping[str, Snapshot]
    snapshot_of: Mapping[str, str]
    fingerprints: Mapping[str, Fingerprint]
    validating: frozenset[str]
    samples: Mapping[str, ClientUpdate]
    file: TensorFile
    settings: ProcessSettings
    default_class: type[L.LightningModule]

    def has_default_model(self, client_id: str) -> bool:
        """Whether a client has the model that was handed to the Trainer."""
        return self.snapshot_of[client_id] == _DEFAULT


def make_plan(
    clients: Sequence[Client],
    module: L.LightningModule,
    data: ClientData,
    *,
    trainer: L.Trainer,
    callbacks: Sequence[L.Callback],
    exchange: Exchange,
    global_branch: bool,
    client_trainer: Callable[[], L.Trainer],
    unbuilt: MutableMapping[L.LightningModule, L.LightningModule],
    seed: int,
) -> Plan:
    """Build and prepare every distinct model, and take the snapshots.

    Args:
        clients: all.
        module: handed to the driver's Trainer; built and prepared in place.
        data: handed to the driver's Trainer.
        trainer: the driver's.
        callbacks: the driver's.
        exchange: the driver's.
        global_branch: `Aggregator.uses_global_branch`.
        client_trainer: makes the clients' Trainer, after callbacks are prepared.
        unbuilt: remembers, from launch to launch, what a module was before the driver built its layers.
        seed: of the run; models are built from it, so that they are the same in a resumed run.

    Raises:
        TypeError: a client's model or datamodule is something else.
        ValueError: what a callback has against a model.
    """
    with _seeded(client_seed(seed, "")):
        datamodules = {client.id: _made(client, "datamodule") for client in clients if client.datamodule is not None}
        for datamodule in _distinct([data.datamodule, *datamodules.values()]):
            _prepare_data(datamodule, trainer)
    data = replace(data, own=_packed(datamodules))
    snapshot_of = _assign_models(clients)
    models = _models(clients, module, snapshot_of, seed)
    prepared = _prepared_callbacks(callbacks, exchange)
    snapshots, fingerprints, file = {}, {}, TensorFile()
    samples: dict[str, ClientUpdate] = {}
    for key, model in models.items():
        late = _builds_late(model) or model in unbuilt
        if late and model not in unbuilt:
            unbuilt[model] = copy.deepcopy(model)
        with _seeded(client_seed(seed, key)):
            _build(model, trainer, data.datamodule)
        for callback in prepared:
            _prepare(callback, model, key, global_branch=global_branch)
        fingerprints[key] = Fingerprint.of(model, exchange)
        users = [client_id for client_id, used in snapshot_of.items() if used == key]
        if users:
            with _detached(data.datamodule):
                snapshots[key] = Snapshot.take((client_trainer(), unbuilt[model] if late else model, data), file)
        if users and not late:
            samples[key] = ClientUpdate(users[0], 0, 1, exchange.architecture(model), exchange.upload(model))
    validating = frozenset(
        client.id
        for client in clients
        if is_overridden("validation_step", models[snapshot_of[client.id]])
        and _validates(datamodules.get(client.id, data.datamodule), data, models[snapshot_of[client.id]])
    )
    return Plan(
        clients=tuple(clients),
        snapshots=snapshots,
        snapshot_of=snapshot_of,
        fingerprints=fingerprints,
        validating=validating,
        samples=samples,
        file=file,
        settings=ProcessSettings.capture(),
        default_class=type(module),
    )


def snapshot_for_newcomer(plan: Plan, client: Client, *, seed: int) -> tuple[Snapshot, TensorFile]:
    """What a client starts from that is in no plan, with the Trainer of those that are.

    Args:
        plan: of the last launch.
        client: with a model and data of its own, or without, for those of the run.
        seed: of the run.

    Returns:
        The snapshot, and the file that it needs, to be closed when it is not needed any more.

    Raises:
        TypeError: the client's model or datamodule is something else.
        ValueError: it brings no model, and no client of the run has the one that was handed to the Trainer.
    """
    if client.model is None and _DEFAULT not in plan.snapshots:
        raise ValueError(
            f"Client `{client.id}` names no model, and no client of this run has the one that was handed to the "
            "Trainer either, so that one was not kept. Write `Client(..., model=...)`."
        )
    trainer, module, data = plan.snapshots.get(_DEFAULT, next(iter(plan.snapshots.values()))).load()
    with _seeded(client_seed(seed, f"the model of client `{client.id}`")):
        module = module if client.model is None else _made(client, "model")
    if client.datamodule is not None:
        with _seeded(client_seed(seed, "")):
            datamodule = _made(client, "datamodule")
            _prepare_data(datamodule, trainer)
        data = replace(data, own={**data.own, **_packed({client.id: datamodule})})
    trainer.strategy.client_ids = (*trainer.strategy.client_ids, client.id)
    file = TensorFile()
    return Snapshot.take((trainer, module, data), file), file


def _assign_models(clients: Sequence[Client]) -> dict[str, str]:
    """Which model each client has, by a name that also says it in messages; one that several give is one model."""
    names: dict[int, str] = {}
    return {
        client.id: _DEFAULT
        if client.model is None
        else names.setdefault(id(client.model), f"the model of client `{client.id}`")
        for client in clients
    }


def _models(
    clients: Sequence[Client], default: L.LightningModule, snapshot_of: Mapping[str, str], seed: int
) -> dict[str, L.LightningModule]:
    models = {_DEFAULT: default}
    for client in clients:
        key = snapshot_of[client.id]
        if key not in models:
            with _seeded(client_seed(seed, key)):
                models[key] = _made(client, "model")
    return models


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Build from a seed, and leave the caller's random stream alone."""
    before = random_state.capture()
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        random_state.restore(before)


def _made(client: Client, what: str) -> Any:
    """A client's own model or datamodule, made if it was given as a class or function."""
    kind = {"model": L.LightningModule, "datamodule": L.LightningDataModule}[what]
    given = getattr(client, what)
    made = given if isinstance(given, kind) or not callable(given) else given()
    require_lightning(made, f"`{what}` of client `{client.id}`")
    if not isinstance(made, kind):
        raise TypeError(
            f"`{what}` of client `{client.id}` must be a {kind.__name__}, or a class or function that makes one "
            f"without arguments, but gave a {type(made).__name__}."
        )
    return made


def _distinct(things: Sequence[Any]) -> list[Any]:
    return list({id(thing): thing for thing in things if thing is not None}.values())


def _prepare_data(datamodule: L.LightningDataModule, trainer: L.Trainer) -> None:
    if is_overridden("prepare_data", datamodule):
        datamodule.trainer = trainer
        datamodule.prepare_data()
        datamodule.trainer = None


def _packed(datamodules: Mapping[str, L.LightningDataModule]) -> dict[str, Tensor]:
    packed: dict[int, Tensor] = {}
    for datamodule in datamodules.values():
        with _detached(datamodule):
            packed.setdefault(id(datamodule), pack_datamodule(datamodule))
    return {client_id: packed[id(datamodule)] for client_id, datamodule in datamodules.items()}


@contextmanager
def _detached(datamodule: L.LightningDataModule | None) -> Iterator[None]:
    """Without its reference to the driver's Trainer, which must not be pickled along."""
    if datamodule is None:
        yield
        return
    before, datamodule.trainer = datamodule.trainer, None
    try:
        yield
    finally:
        datamodule.trainer = before


def _prepared_callbacks(callbacks: Sequence[L.Callback], exchange: Exchange) -> list[FederatedCallback]:
    parts = exchange.parts if isinstance(exchange, JointExchange) else (exchange,)
    found = [callback for callback in callbacks if isinstance(callback, FederatedCallback)]
    return [*found, *(part for part in parts if part not in found)]


def _prepare(callback: FederatedCallback, model: L.LightningModule, key: str, *, global_branch: bool) -> None:
    """Prepare a model; what a callback has against it names whose it is."""
    try:
        callback.prepare_server(model, global_branch=global_branch)
    except ValueError as error:
        if key == _DEFAULT:
            raise
        raise ValueError(f"`{type(callback).__name__}` cannot prepare {key}: {error}") from error


def _builds_late(module: L.LightningModule) -> bool:
    return is_overridden("configure_model", module) or _builds_in_setup(module)


def _builds_in_setup(module: L.LightningModule) -> bool:
    return is_overridden("setup", module) and next(module.parameters(), None) is None


def _build(module: L.LightningModule, trainer: L.Trainer, datamodule: L.LightningDataModule | None) -> None:
    """Let a module build its layers as the driver's own, which belongs to no client."""
    module.trainer = trainer
    if is_overridden("prepare_data", module):
        module.prepare_data()
    if _builds_in_setup(module):
        if datamodule is not None:
            attach_datamodule(trainer, datamodule)
            datamodule.setup("fit")
        module.setup("fit")
    if is_overridden("configure_model", module):
        module.configure_model()


def _validates(datamodule: L.LightningDataModule | None, data: ClientData, module: L.LightningModule) -> bool:
    if datamodule is not None:
        return bool(is_overridden("val_dataloader", datamodule))
    return data.loaders.get("val") is not None or bool(is_overridden("val_dataloader", module))
