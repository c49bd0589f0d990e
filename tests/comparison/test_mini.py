"""A comparison from its file to its records, on tiny models: the very code that real ones go through."""

import dataclasses

import pytest
import torch
from rich.console import Console

from lightning_pfl.comparison.cost import estimated
from lightning_pfl.comparison.evaluation import AGGREGATED, TRAINED
from lightning_pfl.comparison.plan import Comparison, MethodPlan, read_protocol
from lightning_pfl.comparison.preparation import clients_of, prepare
from lightning_pfl.comparison.record import Record, read_records, record_path
from lightning_pfl.comparison.sweep import open_runs, sweep
from lightning_pfl.comparison.training import Bench, run_one
from lightning_pfl.comparison.tuning import TUNING_SEED, tune
from lightning_pfl.comparison.world import DrawnWorld
from lightning_pfl.demo.progress import DemoProgress
from lightning_pfl.demo.run import quiet
from lightning_pfl.methods import fedavg, local_only, ours, routed, routed_local
from tests.comparison.recorded import record as written


class Silent(DemoProgress):
    def stage(self, what):
        pass

    def count(self, done, total):
        pass

    def close(self):
        pass


METHODS = {
    "local": MethodPlan(local_only, role="local"),
    "FedAvg": MethodPlan(fedavg),
    "ours": MethodPlan(ours, role="ours"),
    "ours, routed": MethodPlan(routed, role="ablation"),
    "local, routed": MethodPlan(routed_local, role="ablation"),
}
MINI = Comparison(
    title="Test",
    protocol=read_protocol("mini"),
    scenario="dynamic",
    assignment=("llama", "gemma"),
    methods=METHODS,
    seeds=(0,),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def bench_of(folder):
    """Makes benches that share pictures and a cache."""

    def make(comparison):
        with quiet():
            world = DrawnWorld(folder / "drawn")
            return Bench.of(comparison, prepare(comparison, world, Silent(), cache=folder / "cache"))

    return make


@pytest.fixture(scope="module")
def bench(bench_of):
    return bench_of(MINI)


@pytest.fixture(scope="module")
def finished(bench, folder):
    """Every method with one seed, by a sweep."""
    console = Console(quiet=True)
    assert sweep(MINI, folder / "out", MINI.runs(), bench=lambda: bench, console=console) == 5
    return {record.method: record for record in read_records(folder / "out")}


def test_every_client_is_asked_what_the_protocol_says(finished):
    """Two of eight tasks are a client's own, with 16 questions each; 8 of the others' at the end."""
    for record in finished.values():
        at = [(table.round, table.moment) for table in record.tables]
        assert at == [(1, TRAINED), (2, TRAINED), (2, AGGREGATED)]
        for client, own in enumerate(record.own):
            for column, task in enumerate(record.tasks):
                first, last, _ = (table.total[client][column] for table in record.tables)
                assert (first, last) == ((16, 16) if task in own else (0, 8))


def test_models_are_dealt_out_in_turn(finished):
    assert finished["ours"].models == ["llama", "gemma", "llama", "gemma"]


def test_only_who_exchanges_sends_and_only_ours_mixes(finished):
    assert sum(finished["local"].sent) == sum(finished["local"].received) == 0
    assert min(finished["FedAvg"].sent) > 0
    assert finished["FedAvg"].similarity is None
    weights = torch.tensor(finished["ours"].weights)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(4))


def test_after_aggregation_a_model_is_another(finished):
    """FedAvg gives the clients of one architecture one model, which its own training had made different."""
    assert finished["FedAvg"].tables[1].right != finished["FedAvg"].tables[2].right
    assert finished["local"].tables[1].right == finished["local"].tables[2].right


def test_the_truth_is_who_shares_a_kind_of_question(finished):
    """Every client has one task on colours and one on shapes: half of the pairs of two clients are related."""
    expected = torch.full((4, 4), 0.5).fill_diagonal_(0)
    torch.testing.assert_close(torch.tensor(finished["ours"].relations), expected)


def test_routing_changes_who_answers_and_nothing_of_training(finished):
    """The last round's mixtures and the work of training are the same, and so is what is asked; answers are not."""
    for plain, by_all in (("ours", "ours, routed"), ("local", "local, routed")):
        assert finished[by_all].weights == finished[plain].weights
        assert finished[by_all].operations == finished[plain].operations
        assert finished[by_all].tables[1].total == finished[plain].tables[1].total
        assert finished[by_all].tables[1].right != finished[plain].tables[1].right


def test_routing_costs_keys_up_and_everybodys_adapters_and_keys_down(finished):
    """A tiny model says 32 numbers of a question, so a group of them is 65 of four bytes, and there are eight."""
    plain, by_all = finished["ours"], finished["ours, routed"]
    keys, adapter = 8 * 65 * 4, 7 * (8 * 8 + 8) * 4  # P and Q of seven layers at rank 8
    for client in range(4):
        assert by_all.sent[client] - plain.sent[client] == 2 * keys  # in each of two rounds
        assert by_all.received[client] - plain.received[client] == 2 * 3 * (keys + adapter)  # three others', each time
    assert min(finished["local, routed"].sent) > 0
    assert min(finished["local, routed"].received) > 0


def test_the_probe_is_shown_the_very_questions_that_are_asked(bench):
    """In number and order, for every model: the anchor's own reading of them is the same states."""
    anchor = bench.prepared.questions[MINI.protocol.anchor]
    for task, asked in enumerate(anchor):
        probed = bench.prepared.probed[task]
        for index in range(len(asked)):
            torch.testing.assert_close(probed[index]["states"], asked[index]["states"])
            for other in bench.prepared.questions.values():
                assert other[task][index]["answer"] == probed[index]["answer"]
                assert len(other[task][index]["option_ids"]) == len(probed[index]["option_ids"])


def test_finished_runs_are_passed_over(bench, finished, folder):
    def never():
        raise AssertionError("nothing is to do")

    assert sweep(MINI, folder / "out", MINI.runs(), bench=never, console=Console(quiet=True)) == 0


def test_runs_of_other_settings_are_not_mixed_in(finished, folder):
    other = dataclasses.replace(MINI, methods={"local": dataclasses.replace(METHODS["local"], lr_pq=0.5)})
    with pytest.raises(ValueError, match="other settings"):
        open_runs(other, folder / "out", other.runs())


@pytest.mark.parametrize("method", ["ours", "ours, routed"])
def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(bench, finished, folder, method):
    def stop(round):
        if round == 2:
            raise RuntimeError("stopped")

    place = folder / "stopped"
    with quiet(), pytest.raises(RuntimeError, match="stopped"):
        run_one(bench, method, 0, place, tell=stop)
    assert [path.name for path in place.iterdir()] == ["round-epoch=0.ckpt"]
    told = []
    with quiet():
        record = run_one(bench, method, 0, place, tell=told.append)
    assert told == [2]
    assert record.tables == finished[method].tables
    assert record.weights == finished[method].weights
    assert (record.sent, record.received) == (finished[method].sent, finished[method].received)
    assert not place.exists()


def test_the_estimate_counts_passes(bench):
    costs = estimated(bench, ["local", "ours"])
    assert costs["local"].training > 0
    assert costs["local"].evaluation > 0


def test_clients_and_times_can_be_fewer(folder):
    protocol = dataclasses.replace(MINI.protocol, num_clients=2, times=(1,), self_at=(1,), others_at=(1,))
    fewer = dataclasses.replace(MINI, protocol=protocol)
    clients = clients_of(fewer, DrawnWorld(folder / "drawn"))
    assert [list(client.tasks) for client in clients] == [["shape-255"], ["shape-200"]]
    with pytest.raises(ValueError, match="4 clients with 2 tasks"):
        clients_of(dataclasses.replace(MINI, protocol=dataclasses.replace(protocol, times=(4,))), DrawnWorld(folder))


def test_clients_tasks_can_be_chosen(folder):
    named = {"client-1": ["shape-255", "colour-80"], "client-3": ["colour-200", "shape-140"]}
    protocol = dataclasses.replace(MINI.protocol, clients=named)
    clients = clients_of(dataclasses.replace(MINI, protocol=protocol), DrawnWorld(folder / "drawn"))
    assert {client.id: list(client.tasks) for client in clients} == named
    assert [client.model for client in clients] == ["llama", "gemma"]


def test_whole_models_run_through_the_same_code(bench_of, folder):
    """Static, on one model with adapters in two blocks, from pictures in every step."""
    protocol = dataclasses.replace(
        MINI.protocol, kept_layers=None, num_blocks=2, num_clients=2, steps=2, times=(0,), self_at=(1,), others_at=(1,)
    )
    whole = dataclasses.replace(MINI, protocol=protocol, scenario="static", assignment=("gemma",))
    bench = bench_of(whole)
    with quiet():
        record = run_one(bench, "ours", 0, folder / "whole")
    assert record.models == ["gemma", "gemma"]
    assert record.tables[-1].total == [[16, 8], [8, 16]]
    assert record.similarity is not None


def test_choices_are_made_on_the_validation_side(bench_of, folder):
    """A rate of 0 learns nothing, so any other that learns at all is chosen; nothing of the test side is asked."""
    plan = dataclasses.replace(METHODS["local"], tune={"lr_pq": [0.0, 0.04]})
    protocol = dataclasses.replace(MINI.protocol, steps=16, num_val=32)
    several = dataclasses.replace(MINI, protocol=protocol, methods={"local": plan})
    sides = []

    def bench(comparison):
        sides.append(comparison.side)
        return bench_of(comparison)

    chosen = tune(several, folder / "tuning", bench=bench, console=Console(quiet=True))
    assert chosen == {"local": {"lr_pq": 0.04}}
    assert sides == ["val"]
    record = Record.read(record_path(folder / "tuning", "local (lr_pq 0.04)", TUNING_SEED).read_text())
    assert record.about["side"] == "val"
    assert {(table.round, sum(map(sum, table.total))) for table in record.tables} == {
        (2, 4 * 2 * 16)
    }  # own tasks, once


def test_newcomers_start_from_the_others_and_train_on(bench_of, folder):
    """Clients 0 and 1 have two greys; a newcomer comes with the colours of a third one."""
    comparison = dataclasses.replace(
        MINI,
        protocol=dataclasses.replace(MINI.protocol, num_clients=2),
        newcomers=("colour-140",),
        newcomer_steps=(0, 4, 8),
        methods={name: METHODS[name] for name in ("local", "FedAvg", "ours")},
    )
    bench = bench_of(comparison)
    found = {name: run_one(bench, name, 0, folder / "new" / name).newcomers for name in comparison.methods}
    for name, came in found.items():
        assert [(one.task, one.model, one.total) for one in came] == [
            ("colour-140", "llama", 16),
            ("colour-140", "gemma", 16),
        ]
        assert all(len(one.right) == 3 and max(one.right) <= 16 for one in came), name
    assert found["local"][0].weights == {}
    assert sum(found["ours"][0].weights.values()) == pytest.approx(1)
    assert set(found["ours"][0].weights) == {"client-0", "client-1"}
    assert Record.read(dataclasses.replace(_any_record(), newcomers=found["ours"]).line()).newcomers == found["ours"]


def test_a_newcomers_task_must_be_nobodys(folder):
    comparison = dataclasses.replace(MINI, newcomers=("colour-140",))
    with pytest.raises(ValueError, match=r"no client has.*colour-140"):
        prepare(comparison, DrawnWorld(folder / "drawn"), Silent(), cache=folder / "cache")


def _any_record():
    return written("ours", 0, (5, 5), (5, 5))


def test_clients_of_one_model_may_have_the_directions_that_it_shares_with_another(bench_of, folder):
    alone = dataclasses.replace(MINI, assignment=("llama",))
    shared = dataclasses.replace(alone, aligned_with=("gemma",))

    assert bench_of(alone).prepared.alignment is None
    bench = bench_of(shared)
    assert bench.prepared.alignment is not None
    one, two = (
        run_one(one, "local", 0, folder / "unfinished" / str(number))
        for number, one in enumerate((bench_of(alone), bench))
    )

    assert set(one.models) == set(two.models) == {"llama"}
    assert one.key != two.key
    assert one.tables[-1].right != two.tables[-1].right  # other directions, other answers
