"""How data is divided among clients, and how a client gets its part."""

from lightning_pfl.data.datamodule import ClientDataModule
from lightning_pfl.data.partitions import dirichlet_partition, even_partition, partition_by_key

__all__ = ["ClientDataModule", "dirichlet_partition", "even_partition", "partition_by_key"]
