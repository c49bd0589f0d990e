"""A program for tests: a Ray node is killed in the middle of a round. Prints what came of it as JSON."""

import json
import logging
import math
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from lightning_pfl.federation import Client, LocalPool, Pace, RayPool, RoundRules, SimulatedPool
from tests.federation.runs import strategy_of, trainer_of
from tests.federation.tiny import ClientsOwnData, Tiny


class Waits(Tiny):
    """In round 1 `a` and `b` train until the node is gone; who was on it is run again elsewhere."""

    def __init__(self, notes):
        super().__init__()
        self.notes = notes

    def on_train_start(self):
        client_id, round = self.trainer.strategy.client_id, self.trainer.strategy.round
        if self.notes is None or round != 1 or client_id == "bound":
            return
        (Path(self.notes) / client_id).touch()
        while not (Path(self.notes) / "gone").exists():
            time.sleep(0.05)


def run(pool, clients, notes, rules=None):
    strategy = strategy_of(clients, pool=pool, rules=rules)
    module = Waits(notes)
    trainer = trainer_of(".", strategy, max_epochs=3, limit_val_batches=0, logger=False)
    trainer.fit(module, datamodule=ClientsOwnData())
    states = {client_id: strategy.store.get(client_id).hex() for client_id in strategy.store.ids()}
    return states, [[one.round, one.client_id, one.reason] for one in strategy.left_out]


def main(folder):
    logging.basicConfig(level=logging.WARNING)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    far = cluster.add_node(num_cpus=2, resources={"rack": 1})
    cluster.wait_for_nodes()

    def kill():
        while not all((Path(folder) / client_id).exists() for client_id in ("a", "b")):
            time.sleep(0.05)
        cluster.remove_node(far, allow_graceful=False)  # SIGKILL
        while sum(node["Alive"] for node in ray.nodes()) > 1:  # its processes outlive it by a moment
            time.sleep(0.05)
        (Path(folder) / "gone").touch()

    threading.Thread(target=kill, daemon=True).start()
    clients = [Client("a"), Client("b"), Client("bound", resources={"rack": 1})]
    lost, left_out = run(RayPool(address=cluster.address), clients, folder, RoundRules(quorum=0.6))

    absent = {(client_id, round) for round, client_id, _ in left_out}
    silent = SimulatedPool(
        lambda client_id, round: Pace(seconds=math.inf if (client_id, round) in absent else 1.0),
        pool=LocalPool(resources={"rack": 1}),
    )
    undisturbed, _ = run(silent, clients, None, RoundRules(quorum=0.6, deadline=60.0))
    print(json.dumps({"lost": lost, "undisturbed": undisturbed, "left_out": left_out}), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
