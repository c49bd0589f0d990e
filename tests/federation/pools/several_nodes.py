"""A program for tests: a federation on a cluster of several nodes, of which one joins later. Prints what came of it.

The clients' code lies in a folder that is gone before they start: actors have it from Ray's `runtime_env`. The driver
says that it runs on another machine than the nodes, so the tensor file must be sent.
"""

import json
import logging
import os
import shutil
import sys
import textwrap
from pathlib import Path

import lightning as L
import ray
from ray.cluster_utils import Cluster

from lightning_pfl.federation import Client, LocalPool, RayPool
from lightning_pfl.federation.forecast import forecast
from lightning_pfl.federation.pools import ray as pool_of_actors
from tests.federation.runs import strategy_of, trainer_of
from tests.federation.tiny import ClientsOwnData

CODE = """
    import json
    import os
    import time
    from pathlib import Path

    import ray

    from tests.federation.places import Backbone


    class Shipped(Backbone):
        # Notes where it runs, which GPUs it sees, where its code lies. In round 1 three clients wait for each other.

        def __init__(self, notes):
            super().__init__()
            self.notes = notes

        def on_train_start(self):
            strategy = self.trainer.strategy
            if self.notes is None:
                return
            seen = [ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES"), __file__]
            notes = Path(self.notes)
            (notes / f"{strategy.client_id}-{strategy.round}").write_text(json.dumps(seen))
            begun = time.monotonic()
            together = [notes / f"{name}-1" for name in "abc"]
            while strategy.client_id in "abc" and strategy.round == 1 and not all(map(Path.exists, together)):
                assert time.monotonic() < begun + 120, "three at a time do not fit"
                time.sleep(0.05)
"""


class Grows(L.Callback):
    """Adds a node after the first round."""

    federated_scope = "server"

    def __init__(self, cluster):
        self.cluster = cluster
        self.node_id = None

    def on_train_epoch_end(self, trainer, pl_module):
        if self.node_id is None:
            self.node_id = self.cluster.add_node(num_cpus=1).node_id
            self.cluster.wait_for_nodes()


def run(pool, clients, module, callbacks=()):
    strategy = strategy_of(clients, pool=pool)
    trainer = trainer_of(".", strategy, max_epochs=2, limit_val_batches=0, callbacks=list(callbacks))
    trainer.fit(module, datamodule=ClientsOwnData())
    return {client_id: strategy.store.get(client_id).hex() for client_id in strategy.store.ids()}


def main(folder):
    logging.basicConfig(level=logging.INFO)
    shipped = Path(folder) / "shipped_code"
    shipped.mkdir()
    (shipped / "__init__.py").write_text(textwrap.dedent(CODE))
    sys.path.insert(0, folder)
    from shipped_code import Shipped

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    gpus = cluster.add_node(num_cpus=2, num_gpus=1, resources={"rack": 1})
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, runtime_env={"py_modules": [str(shipped)]}, log_to_driver=False)
    sys.path.remove(folder)
    shutil.rmtree(shipped)

    clients = [Client("a"), Client("b"), Client("c"), Client("bound", resources={"rack": 1}, num_cpus=0)]
    clients += [Client(f"half-{number}", num_gpus=0.5, num_cpus=0.5) for number in range(3)]
    notes = Path(folder) / "notes"
    notes.mkdir()
    grows = Grows(cluster)
    pool_of_actors.machine = lambda: "another machine"
    pool = RayPool(address=cluster.address)
    plan = str(forecast(clients, pool.look(clients), num_clients=len(clients), seconds={}))
    states = run(pool, clients, Shipped(str(notes)), [grows])
    expected = run(LocalPool(resources={"rack": 1, "num_gpus": 1}), clients, Shipped(None))
    seen = {path.name: json.loads(path.read_text()) for path in notes.glob("*-*")}
    print(
        json.dumps(
            {
                "equal": states == expected,
                "plan": plan,
                "seen": seen,
                "gpus": gpus.node_id,
                "joined": grows.node_id,
            }
        ),
        flush=True,
    )
    ray.shutdown()
    cluster.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
