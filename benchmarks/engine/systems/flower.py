"""Flower's simulation engine: its message API, on Ray, one CPU per client. Runs in an environment of its own."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
import torch._dynamo
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.engine.marks import Marks
from benchmarks.engine.model import accuracy, network
from benchmarks.engine.systems.flower_client import turn
from benchmarks.engine.workload import WORKLOADS

client = ClientApp()
server = ServerApp()
NAME = sys.argv[1]
MARKS = Marks(sys.argv[2], rounds=WORKLOADS[NAME].rounds)


@client.train()
def train(message: Message, context: Context) -> Message:
    weights, rows = turn(NAME, int(context.node_config["partition-id"]), message.content["arrays"])
    metrics = MetricRecord({"num-examples": rows})
    return Message(content=RecordDict({"arrays": weights, "metrics": metrics}), reply_to=message)


class Marked(FedAvg):
    """Says when a round has ended."""

    marks: Marks

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        result = super().aggregate_train(server_round, replies)
        self.marks.round()
        return result


@server.main()
def serve(grid: Grid, context: Context) -> None:
    workload = WORKLOADS[NAME]
    random.seed(0)  # cohorts come from it
    strategy = Marked(fraction_train=workload.cohort / workload.clients, fraction_evaluate=0.0)
    strategy.marks = MARKS
    MARKS.started()
    result = strategy.start(
        grid=grid, initial_arrays=ArrayRecord(network(workload).state_dict()), num_rounds=workload.rounds
    )
    MARKS.write(accuracy=accuracy(workload, result.arrays.to_torch_state_dict()))


if __name__ == "__main__":
    MARKS.imported()
    torch.set_num_threads(1)
    run_simulation(
        server,
        client,
        num_supernodes=WORKLOADS[NAME].clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"address": "local", "num_cpus": 2},
        },
    )
