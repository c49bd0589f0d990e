"""`ClientDataModule`: each client sees its own part of one data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

__all__ = ["ClientDataModule"]


class ClientDataModule(L.LightningDataModule):
    """Hand each client its rows of a data set that all share in a simulation.

    On the server, and in a Trainer without `FederatedStrategy`, it holds all rows.

    Args:
        train: a map-style data set.
        parts: row indices of ``train`` by client id, or in the order of the clients (`even_partition`,
            `dirichlet_partition`, `partition_by_key`).
        val: one data set for everybody, or None.
        val_parts: as ``parts``, for ``val``; None gives every client the whole of ``val``.
        test: as ``val``.
        test_parts: as ``val_parts``.
        batch_size: of all loaders; training shuffles, the others do not.
        num_workers: of all loaders.

    Raises:
        ValueError: when set up for a client that no part belongs to.
    """

    def __init__(
        self,
        train: Dataset[Any],
        parts: Mapping[str, Tensor] | Sequence[Tensor],
        *,
        val: Dataset[Any] | None = None,
        val_parts: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
        test: Dataset[Any] | None = None,
        test_parts: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self._train, self._parts = train, parts
        self._val, self._val_parts = val, val_parts
        self._test, self._test_parts = test, test_parts
        self._batch_size, self._num_workers = batch_size, num_workers

    def train_dataloader(self) -> DataLoader[Any]:
        """The client's rows, shuffled."""
        return self._loader(self._mine(self._train, self._parts), shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The client's validation rows; no loader without a data set."""
        return [] if self._val is None else self._loader(self._mine(self._val, self._val_parts))

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The client's test rows; no loader without a data set."""
        return [] if self._test is None else self._loader(self._mine(self._test, self._test_parts))

    def _loader(self, dataset: Dataset[Any], *, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=self._batch_size, shuffle=shuffle, num_workers=self._num_workers)

    def _mine(self, dataset: Dataset[Any], parts: Mapping[str, Tensor] | Sequence[Tensor] | None) -> Dataset[Any]:
        strategy = getattr(self.trainer, "strategy", None)
        client_id = getattr(strategy, "client_id", None)
        if parts is None or client_id is None:
            return dataset
        if isinstance(parts, Mapping):
            if client_id not in parts:
                raise ValueError(f"No part of the data belongs to client `{client_id}`; there are {sorted(parts)}.")
            return Subset(dataset, parts[client_id].tolist())
        index = tuple(getattr(strategy, "client_ids", ())).index(client_id)
        if index >= len(parts):
            raise ValueError(f"Client `{client_id}` is number {index}, but the data has only {len(parts)} parts.")
        return Subset(dataset, parts[index].tolist())
