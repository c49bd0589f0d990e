"""How data is divided among clients and over rounds, and how a client gets its part."""

from lightning_pfl.data.assignments import assign_across, assign_in_turn, assign_shares
from lightning_pfl.data.datamodule import ClientDataModule
from lightning_pfl.data.drift import drifting_order
from lightning_pfl.data.flops import StepCost, estimated_cost, matched_steps, measured_cost
from lightning_pfl.data.partitions import dirichlet_partition, even_partition, partition_by_key
from lightning_pfl.data.replay import CountReplay, Memory, NewRowsOnly, Replay
from lightning_pfl.data.stream_datamodule import StreamDataModule
from lightning_pfl.data.streams import DynamicStream, StaticStream, Stream

__all__ = [
    "ClientDataModule",
    "CountReplay",
    "DynamicStream",
    "Memory",
    "NewRowsOnly",
    "Replay",
    "StaticStream",
    "StepCost",
    "Stream",
    "StreamDataModule",
    "assign_across",
    "assign_in_turn",
    "assign_shares",
    "dirichlet_partition",
    "drifting_order",
    "estimated_cost",
    "even_partition",
    "matched_steps",
    "measured_cost",
    "partition_by_key",
]
