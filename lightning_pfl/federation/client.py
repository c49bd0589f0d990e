"""`Client`: who takes part, with which model, data and resources."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import lightning as L

__all__ = ["Client", "as_clients"]

_FIT_FOR_A_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, eq=False, init=False)
class Client:
    """One participant.

    Args:
        id: letters, digits, ``.``, ``_`` and ``-``, at most 128 of them, starting with a letter or a digit: it names
            folders and metrics.
        model: the client's own LightningModule: a class or a function without required arguments, or an instance.
            None: the module handed to ``trainer.fit``.
        datamodule: the client's own data, in the same forms. None: the datamodule (or loaders) handed to
            ``trainer.fit``, which may read ``trainer.strategy.client_id``.
        num_examples: the client's weight in sample-weighted means. None: as many as one epoch of its training
            data holds.
        num_cpus: CPUs that one turn of this client takes from the pool.
        num_gpus: GPUs that one turn takes, fractions allowed.
        resources: further resources of the cluster, by name.
        num_threads: torch threads of this client, 1 by default. They change bits, so they are the client's and not
            the machine's.

    Raises:
        ValueError: an id that is not fit for a path, a negative number.

    Example:
        >>> Client("ward-3", num_gpus=0.25).id
        'ward-3'
    """

    id: str
    model: Callable[[], L.LightningModule] | L.LightningModule | None
    datamodule: Callable[[], L.LightningDataModule] | L.LightningDataModule | None
    num_examples: int | None
    num_cpus: float
    num_gpus: float
    resources: Mapping[str, float]
    num_threads: int

    def __init__(
        self,
        id: str,
        *,
        model: Callable[[], L.LightningModule] | L.LightningModule | None = None,
        datamodule: Callable[[], L.LightningDataModule] | L.LightningDataModule | None = None,
        num_examples: int | None = None,
        num_cpus: float = 1,
        num_gpus: float = 0,
        resources: Mapping[str, float] | None = None,
        num_threads: int | None = None,
    ) -> None:
        if not isinstance(id, str) or not _FIT_FOR_A_PATH.fullmatch(id) or id.endswith("."):
            raise ValueError(
                f"A client's id names folders and metrics, so it must consist of 1 to 128 letters, digits, `.`, `_` "
                f"and `-`, start with a letter or a digit and not end with a dot, but is {id!r}."
            )
        if num_examples is not None and num_examples <= 0:
            raise ValueError(f"`num_examples` of client `{id}` must be positive, but is {num_examples}.")
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"`num_threads` of client `{id}` must be at least 1, but is {num_threads}.")
        for name, amount in {"num_cpus": num_cpus, "num_gpus": num_gpus, **(resources or {})}.items():
            if not isinstance(amount, (int, float)) or amount < 0:
                raise ValueError(f"`{name}` of client `{id}` must not be negative, but is {amount}.")
        values = {
            "id": id,
            "model": model,
            "datamodule": datamodule,
            "num_examples": num_examples,
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "resources": dict(resources or {}),
            "num_threads": num_threads or 1,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)


def as_clients(clients: int | Sequence[Client]) -> tuple[Client, ...]:
    """Turn what the user wrote into clients with unique ids.

    Args:
        clients: how many (they are called ``client-0``, ``client-1``, ...), or which.

    Raises:
        ValueError: no client, or two with one id (ids that differ only in case count as one: they name folders).
        TypeError: it is neither, or something in the sequence is not a `Client`.

    Example:
        >>> [client.id for client in as_clients(2)]
        ['client-0', 'client-1']
    """
    if isinstance(clients, (bool, str)) or not isinstance(clients, (int, Iterable)):
        raise TypeError(f"`clients` must be a number, or a sequence of `Client` objects, but is {clients!r}.")
    if isinstance(clients, int):
        if clients < 1:
            raise ValueError(f"A federation needs at least one client, but `clients` is {clients}.")
        width = len(str(clients - 1))
        return tuple(Client(f"client-{index:0{width}d}") for index in range(clients))
    if not isinstance(clients, Sequence):
        raise TypeError(f"`clients` must be a number or a sequence of `Client` objects, but is {clients!r}.")
    for client in clients:
        if not isinstance(client, Client):
            way_out = f" Write `Client({client!r})`." if isinstance(client, str) else ""
            raise TypeError(
                f"`clients` must hold `Client` objects, but one is a {type(client).__name__}: {client!r}.{way_out}"
            )
    if not clients:
        raise ValueError("A federation needs at least one client, but `clients` is empty.")
    seen: dict[str, str] = {}
    for client in clients:
        if (folded := client.id.lower()) in seen:
            raise ValueError(
                f"Each client needs an id of its own, but two are called {seen[folded]!r} and {client.id!r} "
                "(ids name folders, and some file systems ignore case)."
            )
        seen[folded] = client.id
    return tuple(clients)
