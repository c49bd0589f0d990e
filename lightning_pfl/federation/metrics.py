"""What metrics are called, and how clients' values become one.

A user's own names stay the names of the means over clients, so that ``monitor="val_loss"`` means after aggregation
what it always meant. ``val_loss_local`` is the same before aggregation, ``client/<id>/val_loss`` one client's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["client_name", "local_name", "mean_over_clients", "per_client"]


def client_name(client_id: str, name: str) -> str:
    """One client's metric.

    Example:
        >>> client_name("ward-3", "val_loss")
        'client/ward-3/val_loss'
    """
    return f"client/{client_id}/{name}"


def local_name(name: str) -> str:
    """A validation metric of a client's own model, before aggregation.

    Example:
        >>> local_name("val_loss"), local_name("val_loss/dataloader_idx_0")
        ('val_loss_local', 'val_loss_local/dataloader_idx_0')
    """
    name, slash, loader = name.partition("/dataloader_idx_")
    return f"{name}_local{slash}{loader}"


def mean_over_clients(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The plain mean of each metric over the clients that have it.

    Example:
        >>> mean_over_clients([{"val_loss": 1.0}, {"val_loss": 2.0, "val_f1": 0.5}])
        {'val_loss': 1.5, 'val_f1': 0.5}
    """
    values: dict[str, list[float]] = {}
    for one in metrics:
        for name, value in one.items():
            values.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}


def per_client(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Each client's metrics under its own name.

    Args:
        metrics: by client id.

    Example:
        >>> per_client({"ward-3": {"val_loss": 1.0}})
        {'client/ward-3/val_loss': 1.0}
    """
    return {client_name(client_id, name): value for client_id, one in metrics.items() for name, value in one.items()}
