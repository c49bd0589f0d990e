"""A client sees its own rows; without a client everybody's."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_pfl.data import ClientDataModule


def datamodule_of(client_id, parts):
    datamodule = ClientDataModule(
        TensorDataset(torch.arange(6)), parts, val=TensorDataset(torch.arange(2)), batch_size=8
    )
    strategy = SimpleNamespace(client_id=client_id, client_ids=("a", "b"))
    datamodule.trainer = SimpleNamespace(strategy=strategy)
    return datamodule


def rows_of(loader):
    return sorted(torch.cat([batch[0] for batch in loader]).tolist())


@pytest.mark.parametrize(
    "parts",
    [{"a": torch.tensor([0, 1]), "b": torch.tensor([2, 3, 5])}, [torch.tensor([0, 1]), torch.tensor([2, 3, 5])]],
)
def test_a_client_sees_its_own_rows(parts):
    assert rows_of(datamodule_of("b", parts).train_dataloader()) == [2, 3, 5]
    assert rows_of(datamodule_of("b", parts).val_dataloader()) == [0, 1]


def test_the_server_sees_all_rows():
    assert rows_of(datamodule_of(None, [torch.tensor([0])]).train_dataloader()) == [0, 1, 2, 3, 4, 5]


def test_a_client_without_a_part_is_an_error():
    with pytest.raises(ValueError, match="No part of the data belongs to client `b`"):
        datamodule_of("b", {"a": torch.tensor([0])}).train_dataloader()
    with pytest.raises(ValueError, match="only 1 parts"):
        datamodule_of("b", [torch.tensor([0])]).train_dataloader()
