"""What is particular to Ray: actors that die, sizes, other machines, and leaving nothing behind."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightning_pfl.federation.client import Client
from lightning_pfl.federation.pools import LocalPool, Pace, RayPool, SimulatedPool
from lightning_pfl.federation.rules import RoundRules, UseLate
from lightning_pfl.federation.tensor_file import TensorFile
from tests.federation.killed import alive, marked, outliving
from tests.federation.places import Eventful, bytes_of, job, snapshot_of, two_rounds
from tests.federation.runs import strategy_of, trainer_of
from tests.federation.test_rounds import Watch, states
from tests.federation.tiny import ClientsOwnData, Tiny

pytestmark = pytest.mark.ray

WARDS = ["ward-1", "ward-2", "ward-3"]


@pytest.fixture
def snapshots(tmp_path):
    with TensorFile(tmp_path / "tensors") as file:
        yield {"model": snapshot_of(Eventful(notes=str(tmp_path)), file)}


@pytest.fixture
def pools(ray_session):
    """Makes pools that are closed at the end."""
    made = []

    def make(**arguments):
        made.append(RayPool(**{"num_actors": 2, **arguments}))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def alone(snapshots, client_ids):
    """What clients give in this process."""
    pool = LocalPool()
    pool.start([Client(client_id) for client_id in client_ids], snapshots)
    return two_rounds(pool, client_ids)


def test_an_actor_that_is_killed_in_the_middle_is_replaced_and_its_client_gives_the_same(
    pools, snapshots, tmp_path, caplog
):
    (tmp_path / "dies-once").touch()  # not here
    expected = alone(snapshots, ["dies-once", *WARDS])
    (tmp_path / "dies-once").unlink()

    pool = pools()
    pool.start([Client(client_id) for client_id in ["dies-once", *WARDS]], snapshots)
    assert two_rounds(pool, ["dies-once", *WARDS]) == expected

    assert (tmp_path / "dies-once").exists()
    assert "The actor that ran client `dies-once` in round 0 died" in caplog.text
    assert "try 2 of 3" in caplog.text


def test_several_actors_killed_in_one_round_and_a_device_that_is_gone_change_nothing(tmp_path, ray_session, caplog):
    """The whole way: strategy, rounds, states. One of the clients dies always, and is only missing."""
    clients = ["dies-once-1", "dies-once-2", "loses-its-gpu", "dies-always", "ward-1"]
    outcomes = []
    for name, pool in (("ray", RayPool(num_actors=2, max_retries=1)), ("simulated", _without("dies-always"))):
        (tmp_path / name).mkdir()
        if name == "simulated":
            for client_id in clients[:3]:
                (tmp_path / name / client_id).touch()  # nothing happens here
        rules = RoundRules(deadline=None if name == "ray" else 60.0, quorum=0.8)
        strategy = strategy_of(clients, pool=pool, rules=rules)
        module = Eventful(str(tmp_path / name))
        trainer = trainer_of(tmp_path, strategy, max_epochs=2, limit_val_batches=0)
        trainer.fit(module, datamodule=ClientsOwnData())
        outcomes.append((states(strategy), module.encoder.weight.tolist()))

    assert outcomes[0] == outcomes[1]
    assert sorted(outcomes[0][0]) == ["dies-once-1", "dies-once-2", "loses-its-gpu", "ward-1"]
    assert "client `dies-once-1` in round 0 died" in caplog.text
    assert "client `dies-once-2` in round 0 died" in caplog.text
    assert "CUDA error: device unavailable). Running the client again" in caplog.text
    assert "client `dies-always` was left out, for the 2. time" in caplog.text


def _without(client_id):
    """Where a client never answers."""
    return SimulatedPool(lambda name, round: Pace(seconds=math.inf if name == client_id else 1.0))


def test_a_node_that_is_killed_in_the_middle_of_a_round_changes_nothing_for_who_can_run_elsewhere(tmp_path):
    """One client needs what only that node had: with a quorum it is missing from then on."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.federation.pools.node_lost", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"lost"')]
    assert lines, done.stdout + done.stderr
    (result,) = map(json.loads, lines)

    assert result["lost"] == result["undisturbed"]
    assert "1 nodes are gone" in done.stderr
    round, client_id, reason = result["left_out"][-1]
    assert (round, client_id) == (2, "bound")
    assert "No node is left that has what it asks for" in reason


def test_what_the_object_store_has_lost_is_sent_again(pools, snapshots, caplog):
    """An object is lost with the process that put it there."""
    import ray

    @ray.remote(num_cpus=0)
    class Mortal:
        def put(self, value):
            return [ray.put(value)]

    pool = pools(num_actors=1, max_retries=1)
    pool.start([Client(client_id) for client_id in ["dies-once", *WARDS]], snapshots)
    pool.wait_until_ready()
    mortal = Mortal.remote()
    for key, reference in pool._parcels.snapshots.items():
        (pool._parcels.snapshots[key],) = ray.get(mortal.put.remote(reference))
    ray.kill(mortal)

    # the first actor has its snapshot already; the one that takes its place does not find it
    results = {result.client_id: bytes_of(result) for result in pool.run([job("dies-once"), job("ward-1")])}

    assert results["ward-1"] == alone(snapshots, WARDS)["ward-1", 0]
    assert "object store has lost what turns start from" in caplog.text


def test_a_client_whose_actor_always_dies_fails_as_lost_and_the_others_go_on_on_one_actor(pools, snapshots):
    """One actor, so that this is also the test that one gives the same as two."""
    pool = pools(num_actors=1, max_retries=0)
    pool.start([Client(client_id) for client_id in ["dies-always", *WARDS]], snapshots)

    (lost,) = pool.run([job("dies-always")])
    assert lost.failure.lost
    assert "The actor that ran it died, 1 times in a row" in lost.failure.trace
    assert two_rounds(pool, WARDS) == alone(snapshots, WARDS)


def test_a_client_that_hangs_is_cancelled_with_its_actor(pools, snapshots, tmp_path):
    pool = pools(num_actors=1)
    pool.start([Client(client_id) for client_id in ["dawdles", *WARDS]], snapshots)
    pool.wait_until_ready()
    pool.submit([job("dawdles")])
    while not list(tmp_path.glob("*.pid")):
        assert pool.next(0.5) is None
    (pid,) = (path.stem for path in tmp_path.glob("*.pid"))

    pool.cancel(["dawdles"])

    assert two_rounds(pool, WARDS) == alone(snapshots, WARDS)
    assert not outliving(lambda: [one for one in [pid] if alive(one)])


def test_rounds_go_on_without_a_client_that_hangs_and_give_what_simulated_ones_do(tmp_path, ray_session):
    outcomes = []
    silent = SimulatedPool(lambda client_id, round: Pace(seconds=math.inf if client_id == "dawdles" else 1.0))
    for pool in (RayPool(num_actors=2), silent):
        strategy = strategy_of([*WARDS[:2], "dawdles"], pool=pool, fraction=2 / 3, rules=RoundRules(over_select=0.5))
        trainer_of(tmp_path, strategy, max_epochs=2).fit(Eventful(str(tmp_path)), datamodule=ClientsOwnData())
        outcomes.append((states(strategy), [(one.round, one.client_id) for one in strategy.left_out]))

    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1] == [(0, "dawdles"), (1, "dawdles")]
    assert not outliving(lambda: [path.stem for path in tmp_path.glob("*.pid") if alive(path.stem)])


class InTurn(Tiny):
    """`slow` trains until the first round is over, and from then on `ward-2` until `slow` is done."""

    def __init__(self, notes):
        super().__init__()
        self.notes = notes

    def on_train_start(self):
        client_id, round = self.trainer.strategy.client_id, self.trainer.strategy.round
        awaited = "round-over" if client_id == "slow" else "slow-done" if client_id == "ward-2" and round else None
        while awaited is not None and not (Path(self.notes) / awaited).exists():
            time.sleep(0.02)

    def on_train_epoch_end(self):
        if self.trainer.strategy.client_id == "slow":
            (Path(self.notes) / "slow-done").touch()


def test_a_late_result_joins_a_later_round(tmp_path, ray_session):
    class TellWhenOver(Watch):
        def aggregate(self, updates, state):
            (tmp_path / "round-over").touch()
            return super().aggregate(updates, state)

    rules = RoundRules(over_select=0.5, late=UseLate(max_rounds=5))
    clients, aggregator = ["slow", "ward-1", "ward-2"], TellWhenOver()
    strategy = strategy_of(clients, pool=RayPool(num_actors=3), aggregator=aggregator, fraction=2 / 3, rules=rules)

    trainer_of(tmp_path, strategy, limit_val_batches=0).fit(InTurn(str(tmp_path)), datamodule=ClientsOwnData())

    assert aggregator.seen[0] == [("ward-1", 0, 0), ("ward-2", 0, 0)]
    (late,) = [item for round in aggregator.seen for item in round if item[:2] == ("slow", 0)]
    assert late[2] in (1, 2)


def test_clients_of_a_size_that_does_not_fit_beside_the_others_get_their_turn(pools, snapshots, caplog):
    pool = pools(num_actors=1)
    pool.start([Client("ward-1", num_cpus=2), Client("ward-2")], snapshots)
    results = {result.client_id: bytes_of(result) for result in pool.run([job("ward-1"), job("ward-2")])}

    expected = alone(snapshots, WARDS)
    assert results == {client_id: expected[client_id, 0] for client_id in WARDS[:2]}
    assert "needs the room of" in caplog.text


def test_actors_on_another_machine_are_sent_the_tensor_file_and_leave_no_copy(pools, snapshots, monkeypatch, caplog):
    monkeypatch.setattr("lightning_pfl.federation.pools.ray.machine", lambda: "another machine")
    caplog.set_level(logging.INFO)
    pool = pools(num_actors=1)
    pool.start([Client(client_id) for client_id in WARDS], snapshots)

    assert two_rounds(pool, WARDS) == alone(snapshots, WARDS)
    assert caplog.text.count("sending 0 MiB of tensors") == 1
    run = pool._actors._setup["run"]
    temporary = Path(os.environ.get("TMPDIR", "/tmp"))
    assert len(list(temporary.glob(f"lightning-pfl-{run}-*/tensors"))) == 1
    pool.close()
    assert not list(temporary.glob(f"lightning-pfl-{run}-*"))


def test_a_ray_that_the_user_started_is_left_running_without_our_actors(pools, snapshots, tmp_path):
    import ray

    pool = pools(num_actors=1)
    pool.start([Client("dawdles-1"), Client("dawdles-2")], snapshots)
    pool.submit([job("dawdles-1"), job("dawdles-2")])
    with pytest.raises(TimeoutError), _interrupted_when(lambda: list(tmp_path.glob("*.pid"))):
        pool.next()
    (pid,) = (path.stem for path in tmp_path.glob("*.pid"))
    assert alive(pid)

    pool.close()  # in the middle of a job

    assert not outliving(lambda: [one for one in [pid] if alive(one)])
    assert ray.is_initialized()
    assert ray.get(ray.remote(lambda: 1).remote()) == 1


def test_ctrl_c_leaves_no_process_and_no_file_of_a_pool_that_started_ray(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background starts with it ignored
        "from lightning_pfl.federation.client import Client\n"
        "from lightning_pfl.federation.pools import RayPool\n"
        "from lightning_pfl.federation.tensor_file import TensorFile\n"
        "from tests.federation.places import Eventful, job, snapshot_of\n"
        f"with TensorFile({str(tmp_path / 'tensors')!r}) as file:\n"
        f"    snapshots = {{'model': snapshot_of(Eventful({str(tmp_path)!r}), file)}}\n"
        "    pool = RayPool(address='local', init={'num_cpus': 1})\n"
        "    try:\n"
        "        pool.start([Client('dawdles')], snapshots)\n"
        "        list(pool.run([job('dawdles')]))\n"
        "    finally:\n"
        "        pool.close()\n"
    )
    mark = uuid.uuid4().hex
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]),
        "RAY_AUTH_MODE": "disabled",
        "FEDERATED_TEST": mark,  # every process that comes of this one has it
    }
    environment.pop("RAY_USAGE_STATS_ENABLED", None)
    process = subprocess.Popen([sys.executable, program], env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 180
    while not list(tmp_path.glob("*.pid")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if not list(tmp_path.glob("*.pid")):
        process.kill()
        raise AssertionError(process.communicate()[1])
    assert len(marked(mark)) > 3
    assert_private(marked(mark) - {process.pid})

    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)

    assert "KeyboardInterrupt" in errors
    assert not list((tmp_path / "tensors").iterdir())
    deadline = time.monotonic() + 30
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not marked(mark)


def assert_private(pids):
    """What Ray starts shows no dashboard and reports to nobody."""
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in pids}

    def running(name):
        (found,) = [pid for pid, words in lines.items() if any(word.endswith(f"/{name}") for word in words[:3])]
        return found

    assert "--disable-frontend" in lines[running("dashboard.py")]
    for name in ("gcs_server", "raylet", "dashboard.py"):  # workers write their titles over their environments
        assert b"RAY_USAGE_STATS_ENABLED=0" in Path(f"/proc/{running(name)}/environ").read_bytes()


TERMINATED = """
    import sys
    from lightning.pytorch.callbacks import OnExceptionCheckpoint
    from lightning.pytorch.utilities.exceptions import SIGTERMException
    from lightning_pfl.federation.pools import RayPool
    from tests.federation.places import Eventful
    from tests.federation.runs import strategy_of, trainer_of
    from tests.federation.tiny import ClientsOwnData

    folder = sys.argv[1]
    strategy = strategy_of(["dawdles"], pool=RayPool(address="local", init={"num_cpus": 1}))
    stopped = OnExceptionCheckpoint(folder, "stopped")
    trainer = trainer_of(folder, strategy, callbacks=[stopped], enable_checkpointing=True)
    try:
        trainer.fit(Eventful(folder), datamodule=ClientsOwnData(num_workers=1))
    except SIGTERMException:
        print("TERMINATED", trainer.state.status, flush=True)
        raise
"""


def test_sigterm_in_a_round_is_lightnings_own_exception_and_leaves_no_process(tmp_path):
    """The client's loader has a worker process, which must be gone too."""
    program, mark = tmp_path / "program.py", uuid.uuid4().hex
    program.write_text(textwrap.dedent(TERMINATED))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]),
        "RAY_AUTH_MODE": "disabled",
        "FEDERATED_TEST": mark,
    }
    with open(tmp_path / "output", "w+") as output:
        process = subprocess.Popen([sys.executable, program, tmp_path], env=environment, stdout=output, stderr=output)
        deadline = time.monotonic() + 180
        while not list(tmp_path.glob("*.pid")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=90)
        output.seek(0)
        text = output.read()

    assert "TERMINATED TrainerStatus.INTERRUPTED" in text, text
    assert code == 0
    assert (tmp_path / "stopped.ckpt").exists()
    deadline = time.monotonic() + 30
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not marked(mark)


def test_counts_out_of_range_are_refused():
    with pytest.raises(ValueError, match="`num_actors` must be at least 1, but is 0"):
        RayPool(num_actors=0)
    with pytest.raises(ValueError, match="`max_retries` must not be negative, but is -1"):
        RayPool(max_retries=-1)


@contextmanager
def _interrupted_when(condition):
    """Raise TimeoutError from a signal handler as soon as a condition holds, whatever the main thread waits for."""

    def look(*_):
        if condition():
            raise TimeoutError

    previous = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
