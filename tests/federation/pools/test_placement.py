"""How many workers of which size fit where."""

import pytest

from lightning_pfl.federation.client import Client
from lightning_pfl.federation.pools.placement import Demand, Placement, check_fit

NODES = {"small": {"CPU": 2.0}, "large": {"CPU": 4.0, "GPU": 1.0, "scanner": 1.0}}


def fill(placement, demand):
    nodes = []
    while (node := placement.take(demand)) is not None:
        nodes.append(node)
    return nodes


def test_workers_go_where_most_is_free():
    assert fill(Placement(NODES, limit=None), Demand(1, 0)) == ["large", "large", "small", "large", "small", "large"]


def test_fractions_of_a_gpu_add_up_to_a_whole_one():
    for parts in range(2, 30):
        assert fill(Placement(NODES, limit=None), Demand(0, 1 / parts)) == ["large"] * parts


def test_named_resources_count():
    assert fill(Placement(NODES, limit=None), Demand(1, 0, (("scanner", 0.5),))) == ["large"] * 2


def test_there_are_never_more_workers_than_the_limit():
    placement = Placement(NODES, limit=2)
    assert len(fill(placement, Demand(1, 0))) == 2
    placement.give_back("small", Demand(1, 0))
    assert len(fill(placement, Demand(1, 0))) == 1


def test_what_is_given_back_can_be_taken_by_another_size():
    placement = Placement({"node": {"CPU": 2.0}}, limit=None)
    fill(placement, Demand(1, 0))
    placement.give_back("node", Demand(1, 0))
    assert placement.take(Demand(2, 0)) is None
    placement.give_back("node", Demand(1, 0))
    assert placement.take(Demand(2, 0)) == "node"


@pytest.mark.parametrize(
    ("client", "message"),
    [
        (
            Client("a", num_cpus=5),
            r"Client `a` asks for CPU=5, but the most that a node has is CPU=4 \(2 nodes\)\. Ask",
        ),
        (Client("a", num_gpus=2), "asks for GPU=2, but the most that a node has is GPU=1"),
        (Client("a", resources={"mri": 1}), "asks for mri=1, but the most that a node has is mri=0"),
    ],
)
def test_a_client_that_fits_nowhere_is_refused_with_both_numbers(client, message):
    with pytest.raises(ValueError, match=message):
        check_fit([Client("ward-3"), client], NODES)


def test_a_client_that_fits_only_on_several_nodes_together_is_refused():
    nodes = {"small": {"CPU": 8.0}, "large": {"CPU": 1.0, "GPU": 1.0}}
    with pytest.raises(ValueError, match=r"CPU=4, GPU=1, but .* CPU=8, GPU=1 .*no node has all of it together"):
        check_fit([Client("a", num_cpus=4, num_gpus=1)], nodes)


def test_what_fits_is_not_refused():
    check_fit([Client("a", num_cpus=4, num_gpus=1, resources={"scanner": 1}), Client("b", num_cpus=0)], NODES)


def test_clients_that_ask_for_the_same_share_workers():
    assert Demand.of(Client("a", resources={"x": 1, "y": 2})) == Demand.of(Client("b", resources={"y": 2, "x": 1}))
    assert Demand.of(Client("a")) != Demand.of(Client("a", num_gpus=1))
