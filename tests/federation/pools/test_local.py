"""What is particular to running clients in this process."""

import pytest
import torch

from lightning_pfl.federation.client import Client
from lightning_pfl.federation.pools import LocalPool
from lightning_pfl.federation.tensor_file import TensorFile
from tests.federation.places import Eventful, bytes_of, job, snapshot_of


def test_ctrl_c_in_a_clients_turn_stops_the_run_and_leaves_the_process_as_it_was(tmp_path):
    with TensorFile(tmp_path) as file:
        pool = LocalPool()
        pool.start([Client("interrupts"), Client("ward-1")], {"model": snapshot_of(Eventful(), file)})
        torch.manual_seed(3)
        with pytest.raises(KeyboardInterrupt):
            list(pool.run([job("interrupts"), job("ward-1")]))
        assert torch.initial_seed() == 3
        (result,) = pool.run([job("ward-1")])
        bytes_of(result)
        pool.close()


def test_a_process_may_stand_in_for_a_cluster_with_named_resources():
    client = Client("ward-3", resources={"scanner": 1})
    with pytest.raises(ValueError, match="asks for scanner=1, but this machine has 0"):
        LocalPool().start([client], {})
    LocalPool(resources={"scanner": 1}).start([client], {})
