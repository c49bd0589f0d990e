"""What every pool promises, whatever the place where it runs clients."""

import random
import signal
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_pfl.federation.client import Client
from lightning_pfl.federation.pools import LocalPool, Pace, RayPool, SimulatedPool, StackedPool
from lightning_pfl.federation.tensor_file import TensorFile
from tests.federation.places import Eventful, bytes_of, job, snapshot_of, two_rounds
from tests.federation.tiny import Tiny

WARDS = ["ward-1", "ward-2", "ward-3"]
MANY = [f"ward-{number}" for number in range(1, 13)]


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    with TensorFile(tmp_path_factory.mktemp("tensors")) as file:
        yield {"model": snapshot_of(Eventful(), file), "tiny": snapshot_of(Tiny(), file)}


@pytest.fixture(scope="module")
def expected(snapshots):
    """What three clients give in two rounds, one after another in this process."""
    pool = LocalPool()
    pool.start([Client(client_id) for client_id in WARDS], snapshots)
    results = two_rounds(pool, WARDS)
    pool.close()
    return results


@pytest.fixture(scope="module", params=["local", "simulated", "stacked", pytest.param("ray", marks=pytest.mark.ray)])
def make_pool(request):
    if request.param == "ray":
        request.getfixturevalue("ray_session")
        return partial(RayPool, num_actors=2)  # of four: tests start pools beside the one that most of them share
    if request.param == "simulated":
        return lambda: SimulatedPool(lambda client_id, round: Pace(seconds=1.0))
    return StackedPool if request.param == "stacked" else LocalPool


@pytest.fixture(scope="module")
def pool(make_pool, snapshots):
    pool = make_pool()
    pool.start([Client(client_id) for client_id in [*MANY, "raises"]], snapshots)
    yield pool
    pool.close()


@pytest.mark.parametrize("reverse", [False, True])
def test_the_same_jobs_give_the_same_bytes_in_any_order(pool, expected, reverse):
    assert two_rounds(pool, WARDS, reverse=reverse) == expected


def test_a_second_round_goes_on_from_the_first(expected):
    """Without this the equality above would be that of turns which forget everything."""
    (_, _, first, _), (_, _, second, _) = expected["ward-1", 0], expected["ward-1", 1]
    assert first != second


def test_every_job_gives_one_result_when_there_are_more_jobs_than_places(pool):
    jobs = [job(client_id, snapshot="tiny") for client_id in MANY]
    results = list(pool.run(jobs))
    assert sorted(result.client_id for result in results) == sorted(MANY)
    assert len({bytes_of(result)[2] for result in results}) == 12


def test_a_client_that_raises_shows_its_traceback_and_the_others_go_on(pool, expected):
    results = {result.client_id: result for result in pool.run([job(client_id) for client_id in ["raises", *WARDS]])}

    failure = results.pop("raises").failure
    assert "ZeroDivisionError: what raises did" in failure.trace
    assert "in training_step" in failure.trace
    assert not failure.lost
    assert {(client_id, 0): bytes_of(result) for client_id, result in results.items()} == {
        key: value for key, value in expected.items() if key[1] == 0
    }


def test_evaluation_and_prediction_give_the_same_everywhere(pool, snapshots):
    here = LocalPool()
    here.start([Client("ward-1")], snapshots)
    (trained,) = here.run([job("ward-1")])
    for stage in (TrainerFn.VALIDATING, TrainerFn.TESTING, TrainerFn.PREDICTING):
        work = job("ward-1", stage=stage, state=trained.state)
        (mine,), (reference,) = pool.run([work]), here.run([work])
        assert bytes_of(mine) == bytes_of(reference)
        assert (len(mine.metrics) > 0) == (stage is not TrainerFn.PREDICTING)
        torch.testing.assert_close(mine.predictions, reference.predictions, rtol=0, atol=0)


def test_the_number_of_threads_is_the_jobs(pool):
    before = torch.get_num_threads()
    list(pool.run([job("ward-1", num_threads=2)]))
    assert torch.get_num_threads() == before


def test_the_callers_process_is_left_as_it_was(pool):
    L.seed_everything(3, verbose=False)
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        ours = signal.getsignal(signal.SIGTERM)
        L.seed_everything(3, verbose=False)
        list(pool.run([job("ward-1"), job("raises")]))

        assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
        assert signal.getsignal(signal.SIGTERM) is ours
        assert torch.is_grad_enabled()
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_where_the_caller_stands_changes_nothing(pool, expected):
    """The server's loop calls from inside its validation step and its precision plugin's contexts."""
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        results = [bytes_of(result) for result in pool.run([job(client_id) for client_id in WARDS])]
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert sorted(results, key=str) == sorted((expected[client_id, 0] for client_id in WARDS), key=str)


def test_results_that_are_not_read_do_not_come_back_later(pool, expected):
    unread = pool.run([job("raises"), job("ward-2"), job("ward-3")])
    next(unread)
    unread.close()
    assert two_rounds(pool, WARDS) == expected


def test_nothing_comes_of_a_job_that_is_cancelled(pool, expected):
    pool.submit([job(client_id) for client_id in WARDS])
    pool.cancel(["ward-2", "raises"])  # of which one has no job

    assert {pool.next().client_id, pool.next().client_id} == {"ward-1", "ward-3"}
    assert pool.next() is None
    assert two_rounds(pool, WARDS) == expected


def test_waiting_ends_when_its_time_is_over(pool):
    pool.wait_until_ready()
    pool.submit([job("ward-1")])
    before = pool.now()

    assert pool.next(0.0) is None
    assert pool.next().client_id == "ward-1"
    assert pool.now() > before
    assert pool.next(0.0) is None


def test_jobs_may_be_added_while_others_are_at_work(pool, expected):
    pool.submit([job("ward-1"), job("ward-2")])
    first = pool.next()
    pool.submit([job("ward-3")])

    results = [first, pool.next(), pool.next()]
    assert {result.client_id: bytes_of(result) for result in results} == {
        client_id: expected[client_id, 0] for client_id in WARDS
    }


@pytest.mark.parametrize(
    ("client", "message"),
    [
        (Client("greedy", num_cpus=1000), r"Client `greedy` asks for .*=1000, but .* \S*\d+"),
        (Client("greedy", num_gpus=64), r"Client `greedy` asks for .*=64, but"),
        (Client("greedy", resources={"scanner": 3}), r"Client `greedy` asks for scanner=3, but .* \S*0"),
    ],
)
def test_a_client_that_fits_nowhere_is_refused_before_anything_runs(make_pool, snapshots, client, message):
    pool = make_pool()
    with pytest.raises(ValueError, match=message):
        pool.start([Client("ward-1"), client], snapshots)
    pool.close()


def test_a_pool_that_was_not_started_says_so(make_pool):
    pool = make_pool()
    with pytest.raises(RuntimeError, match="call `start` before `submit`"):
        list(pool.run([job("ward-1")]))
    pool.close()
    pool.close()


def test_a_pool_can_be_started_again(make_pool, snapshots, expected):
    pool = make_pool()
    for _ in range(2):
        pool.start([Client("ward-1")], snapshots)
        (result,) = pool.run([job("ward-1")])
        assert bytes_of(result) == expected["ward-1", 0]
        pool.close()
    with pytest.raises(RuntimeError, match="call `start`"):
        list(pool.run([job("ward-1")]))
