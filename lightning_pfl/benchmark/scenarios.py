"""Scenario files: which client has which tasks in which order, and which model.

Start at `read_scenario`, which reads the published files of DRAKE, HFLB and their text-only siblings as they are. A
scenario names tasks; `load_tasks` reads them. A slot whose data set is called "dummy" is idle: the client has nothing
to learn there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from upath import UPath

from lightning_pfl.benchmark.locations import as_path
from lightning_pfl.benchmark.records import UnknownTaskError, read_task
from lightning_pfl.benchmark.tasks import Task

__all__ = ["Scenario", "ScenarioClient", "ScenarioError", "Slot", "load_tasks", "read_scenario", "write_scenario"]

IDLE = "dummy"
"""Data set of a slot in which a client has nothing to learn."""


class ScenarioError(ValueError):
    """A scenario that cannot be used; the message begins with its file and the client's place in it."""


@dataclass(frozen=True)
class Slot:
    """One client's task in one stretch of time.

    Attributes:
        dataset: name of the data set; `IDLE` for none.
        subset_id: number of the subset in it.
        kind: "multi-choice", "open-ended" or whatever the file says; empty where it says nothing.
        metric: such as "F1"; None where the kind's own is meant.
    """

    dataset: str
    subset_id: int = 0
    kind: str = ""
    metric: str | None = None

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to learn."""
        return self.dataset == IDLE

    @property
    def is_open(self) -> bool:
        """Whether its questions are open ones."""
        return self.kind == "open-ended"

    @property
    def task(self) -> str:
        """Name of the task, as `read_task` gives it.

        Example:
            >>> Slot("iconqa", 2, "open-ended", "F1").task
            'iconqa-2'
        """
        return f"{self.dataset}-{self.subset_id}"


@dataclass(frozen=True)
class ScenarioClient:
    """One client.

    Attributes:
        number: ``client_id`` of the file.
        model_id: name of its model, a hub id or a path.
        slots: in the order of time.
    """

    number: int
    model_id: str
    slots: tuple[Slot, ...]

    @property
    def id(self) -> str:
        """Fit for a `Client`: ``client-3``."""
        return f"client-{self.number}"


@dataclass(frozen=True)
class Scenario:
    """Who learns what, when, with which model."""

    clients: tuple[ScenarioClient, ...]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every distinct task, in the order of clients and time, without idle slots."""
        slots = (slot for client in self.clients for slot in client.slots if not slot.is_idle)
        return tuple({slot.task: slot for slot in slots}.values())

    @property
    def models(self) -> dict[str, str]:
        """Model id by client id."""
        return {client.id: client.model_id for client in self.clients}

    @property
    def tasks(self) -> dict[str, tuple[str, ...]]:
        """Own tasks by client id, as `PersonalizationScores` takes them."""
        return {client.id: tuple(slot.task for slot in client.slots if not slot.is_idle) for client in self.clients}

    def with_models(self, models: Mapping[str, str]) -> Scenario:
        """The same with other models, by client id (`assign_in_turn` and its siblings make them).

        Raises:
            ValueError: a client without a model.
        """
        if missing := [client.id for client in self.clients if client.id not in models]:
            raise ValueError(f"`models` must name a model for every client, but has none for {missing}.")
        return Scenario(
            tuple(ScenarioClient(client.number, models[client.id], client.slots) for client in self.clients)
        )

    def train_sizes(self, tasks: Mapping[str, Task]) -> dict[str, tuple[int, ...]]:
        """Training examples per slot by client id, 0 for idle ones: what a `Stream` is made of."""
        return {
            client.id: tuple(0 if slot.is_idle else len(tasks[slot.task].train) for slot in client.slots)
            for client in self.clients
        }


def read_scenario(path: str | os.PathLike[str] | UPath) -> Scenario:
    """Read a published scenario file: a JSON list of clients.

    Args:
        path: local or an address that fsspec reads.

    Raises:
        FileNotFoundError: no such file.
        ScenarioError: it is not JSON, not a list of clients, a field is missing or of another type, or two clients have
            one id.
    """
    path = as_path(path)
    try:
        entries = json.loads(path.read_bytes().decode("utf8"))
    except (ValueError, RecursionError) as error:  # bytes that are no text, numbers and nesting without end, too
        raise ScenarioError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ScenarioError(f"{path} must hold a list of clients, but holds {_said(entries)}.")
    clients = tuple(_client(entry, f"{path}, client {index}") for index, entry in enumerate(entries))
    numbers = [client.number for client in clients]
    if twice := sorted({number for number in numbers if numbers.count(number) > 1}):
        raise ScenarioError(f"{path} must give every client an id of its own, but {twice} occur more than once.")
    return Scenario(clients)


def write_scenario(scenario: Scenario, path: str | os.PathLike[str] | UPath) -> None:
    """Write a scenario in the published form; folders are made."""
    entries = [
        {
            "client_id": client.number,
            "datasets": [
                {"dataset": slot.dataset, "subset_id": slot.subset_id, "type": slot.kind}
                | ({} if slot.metric is None else {"metric": slot.metric})
                for slot in client.slots
            ],
            "model_id": client.model_id,
        }
        for client in scenario.clients
    ]
    target = as_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf8")


def load_tasks(scenario: Scenario, root: str | os.PathLike[str] | UPath) -> dict[str, Task]:
    """Read every task of a scenario once.

    Args:
        scenario: which tasks.
        root: parent of the data set folders, local or an address that fsspec reads.

    Returns:
        Tasks by name. Each one's family is its data set.

    Raises:
        UnknownTaskError: tasks that the folder does not have, all of them in one message.
        RecordError: a record that cannot be used.
    """
    tasks: dict[str, Task] = {}
    unknown: list[str] = []
    for slot in scenario.slots:
        try:
            tasks[slot.task] = read_task(root, slot.dataset, slot.subset_id, is_open=slot.is_open)
        except UnknownTaskError as error:
            owners = [client.id for client in scenario.clients if slot.task in {one.task for one in client.slots}]
            unknown.append(f"{slot.task} of {', '.join(owners)}: {error}")
    if unknown:
        raise UnknownTaskError("The scenario names tasks that are not there:\n" + "\n".join(unknown))
    return tasks


def _client(entry: Any, where: str) -> ScenarioClient:
    if not isinstance(entry, dict):
        raise ScenarioError(f"{where} must be an object, but is {_said(entry)}.")
    number = _field(entry, "client_id", int, where)
    model = _field(entry, "model_id", str, where)
    slots = _field(entry, "datasets", list, where)
    if not slots:
        raise ScenarioError(f"{where} must have at least one data set; an idle slot is called {IDLE!r}.")
    return ScenarioClient(number, model, tuple(_slot(slot, f"{where}, slot {i}") for i, slot in enumerate(slots)))


def _slot(slot: Any, where: str) -> Slot:
    if not isinstance(slot, dict):
        raise ScenarioError(f"{where} must be an object, but is {_said(slot)}.")
    dataset = _field(slot, "dataset", str, where)
    if dataset == IDLE:
        number = slot.get("subset_id", 0)
        try:
            return Slot(IDLE, int(number), str(slot.get("type", "")))
        except (TypeError, ValueError, OverflowError):
            raise ScenarioError(f"{where} must have a number as `subset_id`, but has {_said(number)}.") from None
    subset = _field(slot, "subset_id", int, where)
    metric = slot.get("metric")
    return Slot(dataset, subset, str(slot.get("type", "")), None if metric is None else str(metric))


def _field(entry: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    value = entry.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ScenarioError(f"{where} must have `{name}` as {kind.__name__}, but has {_said(value)}.")
    return value


def _said(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
