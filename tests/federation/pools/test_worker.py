"""The far side of a pool, here without a far side: what it does with jobs, snapshots and files."""

import os
from pathlib import Path

import pytest
from lightning.pytorch.trainer.states import TrainerFn

from lightning_pfl.federation.pickling import dump, load
from lightning_pfl.federation.pools.isolation import ProcessSettings
from lightning_pfl.federation.pools.worker import Worker, WorkerSetup, machine
from lightning_pfl.federation.tensor_file import TensorFile
from tests.federation.places import Eventful, bytes_of, job, snapshot_of


@pytest.fixture
def file(tmp_path):
    with TensorFile(tmp_path / "driver") as file:
        yield file


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """Where a machine keeps copies of files."""
    folder = tmp_path / "machine"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def snapshot(file):
    return snapshot_of(Eventful(), file)


def worker_of(snapshot, *, where=None, hide_gpus=False):
    setup = WorkerSetup(ProcessSettings.capture(), os.getcwd(), where or machine(), "run", hide_gpus)
    return Worker(setup, {"model": snapshot}.__getitem__)


def run(worker, job):
    return worker.run(dump(job), "model", job.seed, job.num_threads)


def pieces_of(snapshot):
    yield Path(snapshot.file.path).read_bytes()[:1000]
    yield Path(snapshot.file.path).read_bytes()[1000 : snapshot.file.nbytes]


def test_a_worker_on_the_same_machine_uses_the_file_where_it_lies(snapshot, copies):
    worker = worker_of(snapshot)
    assert worker.warm_up("model").missing is None
    bytes_of(load(run(worker, job("ward-1")).result))
    assert not list(copies.iterdir())


def test_a_worker_elsewhere_asks_for_the_file_and_gives_the_same_result(snapshot, copies):
    expected = bytes_of(load(run(worker_of(snapshot), job("ward-1")).result))
    worker = worker_of(snapshot, where="another machine")

    assert worker.warm_up("model").missing == snapshot.file
    assert run(worker, job("ward-1")).missing == snapshot.file
    worker.receive(snapshot.file, pieces_of(snapshot))

    assert bytes_of(load(run(worker, job("ward-1")).result)) == expected
    worker.forget()
    assert not list(copies.iterdir())


def test_workers_of_one_machine_share_one_copy(snapshot, copies):
    def nothing():
        raise AssertionError("the file was sent twice")
        yield

    first, second = (worker_of(snapshot, where="another machine") for _ in range(2))
    first.receive(snapshot.file, pieces_of(snapshot))
    second.receive(snapshot.file, nothing())
    results = [bytes_of(load(run(worker, job("ward-1")).result)) for worker in (first, second)]
    assert results[0] == results[1]
    assert len(list(copies.rglob("tensors"))) == 1
    first.forget()


def test_a_copy_that_vanished_is_asked_for_again(snapshot, copies):
    worker = worker_of(snapshot, where="another machine")
    worker.receive(snapshot.file, pieces_of(snapshot))
    bytes_of(load(run(worker, job("ward-1")).result))
    next(copies.rglob("tensors")).unlink()

    assert run(worker, job("ward-1")).missing == snapshot.file
    worker.receive(snapshot.file, pieces_of(snapshot))
    bytes_of(load(run(worker, job("ward-1")).result))
    worker.forget()


def test_a_result_that_cannot_be_pickled_is_a_failure_that_names_it(snapshot):
    result = load(run(worker_of(snapshot), job("cannot-be-sent", stage=TrainerFn.PREDICTING)).result)
    assert "client `cannot-be-sent` returned cannot be sent" in result.failure.trace
    assert "`predictions" in result.failure.trace
    assert "cannot pickle 'generator' object" in result.failure.trace


def test_snapshots_are_fetched_once_as_long_as_there_are_few(snapshot):
    fetched = []

    def fetch(name):
        fetched.append(name)
        return snapshot

    setup = WorkerSetup(ProcessSettings.capture(), os.getcwd(), machine(), "run", False)
    worker = Worker(setup, fetch)
    for name in ["a", "b", "a", *"cdefgh", "a", "i", "a", "b"]:
        worker.warm_up(name)
    assert fetched == [*"abcdefgh", "i", "b"]  # eight are kept; b was used longest ago when i came


def test_a_worker_whose_clients_ask_for_no_gpu_sees_none(snapshot, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    worker_of(snapshot)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    worker_of(snapshot, hide_gpus=True)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
