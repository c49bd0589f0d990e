"""What is said before a run starts, and what is refused."""

import logging

import pytest

from lightning_pfl.federation import Client, LocalPool, Pace, SimulatedPool
from lightning_pfl.federation.forecast import Forecast, forecast
from lightning_pfl.federation.pools.placement import Placement, longest_first
from tests.federation.runs import strategy_of, trainer_of
from tests.federation.test_strategy import colora
from tests.federation.tiny import Blocks, ClientsOwnData, Tiny

NODE = {"node": {"CPU": 8.0, "GPU": 1.0}}


pytestmark = pytest.mark.usefixtures("told")


def wards(count, **arguments):
    return [Client(f"ward-{number}", **arguments) for number in range(count)]


def plan(clients, nodes=NODE, *, limit=None, num_clients=None, seconds=None):
    room = Placement(nodes, limit=limit)
    return forecast(clients, room, num_clients=num_clients or len(clients), seconds=seconds or {})


def test_twelve_clients_of_a_minute_take_four_minutes_on_three_actors():
    clients = wards(12)

    found = plan(clients, limit=3, seconds={client.id: 60.0 for client in clients})

    assert str(found) == "12 clients, 3 at a time, about 4 min a round"


@pytest.mark.parametrize(
    ("clients", "nodes", "at_a_time"),
    [
        (wards(6, num_gpus=0.5), NODE, 2),
        (wards(6, num_cpus=3), NODE, 2),
        (wards(6, num_cpus=0.5), {"near": {"CPU": 1.0}, "far": {"CPU": 1.5}}, 5),
        (wards(6, resources={"rack": 1}), {"near": {"CPU": 8.0}, "far": {"CPU": 8.0, "rack": 3.0}}, 3),
        ([*wards(3), *[Client(f"big-{number}", num_gpus=1) for number in range(3)]], NODE, 4),
    ],
    ids=["halves of a GPU", "CPUs", "two nodes", "racks", "two sizes"],
)
def test_what_clients_ask_for_says_how_many_run_at_a_time(clients, nodes, at_a_time):
    assert plan(clients, nodes) == Forecast(6, at_a_time, None)


def test_a_long_turn_goes_first_and_unknown_ones_before_all():
    """By hand on two actors: 9 | 4 3 2 lasts 9; in the order of names, 2 4 | 3 9 would last 12."""
    seconds = {"ward-0": 2.0, "ward-1": 3.0, "ward-2": 4.0, "ward-3": 9.0}

    assert plan(wards(4), limit=2, seconds=seconds).seconds == 9.0
    assert longest_first([f"ward-{number}" for number in range(5)], seconds)[:2] == ["ward-4", "ward-3"]


def test_who_has_not_run_yet_counts_as_the_others_do():
    assert plan(wards(3), limit=1, seconds={"ward-0": 10.0, "ward-1": 20.0}).seconds == 45.0


def test_a_part_of_the_clients_is_a_shorter_round():
    assert plan(wards(6), limit=1, num_clients=2, seconds={"ward-0": 10.0}).seconds == 20.0


def test_local_and_simulated_pools_say_how_many_turns_they_run_at_a_time():
    clients = wards(5, num_gpus=0)
    assert forecast(clients, LocalPool().look(clients), num_clients=5, seconds={}).at_a_time == 1
    simulated = SimulatedPool(lambda client_id, round: Pace())
    assert forecast(clients, simulated.look(clients), num_clients=5, seconds={}).at_a_time == 5


def test_the_plan_is_told_before_a_run_and_knows_times_from_the_last(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    strategy = strategy_of(4, fraction=0.5, share=["head"])
    trainer, module = trainer_of(tmp_path, strategy, max_epochs=2, limit_val_batches=0), Blocks()
    trainer.fit(module, datamodule=ClientsOwnData())
    first = caplog.text
    assert "Federation: 2 clients, 1 at a time; how long a round takes is known after the first." in first
    assert "The first round took " in first
    assert "; 1 more will take about " in first

    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, datamodule=ClientsOwnData())

    assert "Federation: 2 clients, 1 at a time, about " in caplog.text[len(first) :]
    assert all(0 < seconds < 60 for seconds in strategy.seconds.values())


def test_a_dry_run_says_the_plan_and_trains_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    strategy = strategy_of(3, share=(), dry_run=True)
    trainer, module = trainer_of(tmp_path, strategy, callbacks=[colora()]), Blocks()

    trainer.fit(module, datamodule=ClientsOwnData())

    assert "Federation: 3 clients, 1 at a time" in caplog.text
    assert strategy.store.ids() == []
    assert (trainer.current_epoch, trainer.state.status.value) == (0, "finished")
    assert any("colora" in name for name, _ in module.named_parameters())  # what would be trained stands

    strategy.dry_run = False
    trainer.fit(module, datamodule=ClientsOwnData())
    assert len(strategy.store.ids()) == 3


def test_a_dry_run_refuses_what_does_not_fit_with_both_numbers(tmp_path):
    strategy = strategy_of([Client("a"), Client("b", num_gpus=3)], dry_run=True)

    with pytest.raises(ValueError, match="Client `b` asks for num_gpus=3, but this machine has 0"):
        trainer_of(tmp_path, strategy).fit(Tiny(), datamodule=ClientsOwnData())
