"""All rounds can be asked for, and few of them are in memory."""

import gc
import io
import weakref

import pytest
import torch

from lightning_pfl.errors import CheckpointMismatchError
from lightning_pfl.federation import ClientStore
from lightning_pfl.federation.blobs import Blobs
from lightning_pfl.federation.history import RelevanceRecord, RoundTraffic, Traffic
from lightning_pfl.federation.round_log import RoundLog
from lightning_pfl.federation.server_state import ServerState
from tests.federation.runs import strategy_of, trainer_of
from tests.federation.test_resume import fit
from tests.federation.tiny import ClientsOwnData, Tiny

SIZE = 150  # clients: two matrices of 90 kB per round, so that a mebibyte is full after the sixth


def record(round):
    generator = torch.Generator().manual_seed(round)
    weights, similarity = torch.rand(2, SIZE, SIZE, generator=generator)
    return RelevanceRecord(round, tuple(f"ward-{index}" for index in range(SIZE)), weights, similarity)


def empty(blobs):
    return RoundLog("relevance", RelevanceRecord.load, blobs)


def filled(blobs, rounds=20):
    log = empty(blobs)
    for round in range(rounds):
        log.settle()
        log.append(record(round))
    return log


def assert_same(log, rounds):
    assert [one.round for one in log] == list(rounds)
    assert len(log) == len(rounds)
    for one, round in zip(log, rounds, strict=True):
        assert one.client_ids == record(round).client_ids
        assert torch.equal(one.weights, record(round).weights)
        assert torch.equal(one.similarity, record(round).similarity)


@pytest.fixture(params=["temporary", "folder"])
def blobs(request, tmp_path):
    made = Blobs(None if request.param == "temporary" else str(tmp_path / "store"))
    yield made
    made.close()


def test_every_round_comes_back_and_the_newest_ones_alone_are_in_memory(blobs):
    log, alive = empty(blobs), []
    for round in range(20):
        log.settle()
        log.append(record(round))
        alive.append(weakref.ref(log[-1]))
        assert sum(one() is not None for one in alive) <= 6

    assert_same(log, range(20))
    assert [log[index].round for index in (0, 5, 6, 19, -1, -20)] == [0, 5, 6, 19, 19, 0]
    assert [one.round for one in log[4:8]] == [4, 5, 6, 7]
    with pytest.raises(IndexError, match="There are 20 rounds, but number 20 was asked for"):
        log[20]


def test_what_is_in_memory_of_small_rounds_does_not_grow_with_their_number():
    """Two clients' rounds would fill a mebibyte after some thousands only."""
    state = ServerState(["a", "b"], ClientStore())

    def living():
        gc.collect()
        return sum(type(one) in (RelevanceRecord, RoundTraffic) for one in gc.get_objects())

    before = living()
    for round in range(350):
        state.settle()
        state.count(round, "a", Traffic(up=round, down=7))
        state.relevance.append(RelevanceRecord(round, ("a", "b"), torch.full((2, 2), float(round)), None))
        if round in (150, 250, 349):
            assert living() - before <= 2 * 100

    assert [(one.round, one.by_client) for one in state.traffic_by_round] == [
        (round, {"a": Traffic(up=round, down=7)}) for round in range(350)
    ]
    assert [(one.round, float(one.weights[0, 0])) for one in state.relevance] == [(at, at) for at in range(350)]
    state.store.close()


def test_a_checkpoint_brings_all_rounds_back(blobs, tmp_path):
    stream = io.BytesIO()
    torch.save(filled(blobs).state_dict(), stream)
    saved = torch.load(io.BytesIO(stream.getvalue()), weights_only=True)

    other = blobs if blobs.url else Blobs()
    log = empty(other)
    log.load_state_dict(saved)
    log.append(record(20))

    assert_same(log, range(21))
    # under a URL it holds names alone; without, 18 rounds of 180 kB
    assert (len(stream.getvalue()) < 1e6) == (blobs.url is not None)


def test_rounds_that_are_gone_or_damaged_are_said_so(tmp_path):
    blobs = Blobs(str(tmp_path))
    log = filled(blobs)
    saved = log.state_dict()
    first, *_ = sorted(tmp_path.glob("_relevance/*.rounds"), key=lambda path: path.stat().st_mtime_ns)

    content = bytearray(first.read_bytes())
    content[1000] ^= 1
    first.write_bytes(content)
    with pytest.raises(CheckpointMismatchError, match="The relevance of rounds 0 to 5 is damaged"):
        log[3]
    first.unlink()
    with pytest.raises(CheckpointMismatchError, match="The relevance of rounds 0 to 5 is gone"):
        list(log)
    with pytest.raises(
        CheckpointMismatchError, match=r"refers to the relevance of rounds 0 to 5, but the store .* lacks"
    ):
        empty(blobs).load_state_dict(saved)


def test_a_full_disk_ends_the_run_before_the_round_and_loses_none(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_pfl.federation.round_log._FULL", 1)
    strategy = strategy_of("abc")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_pfl.federation.blobs.write_whole", full)
    with pytest.raises(OSError, match=r"cannot store the relevance of rounds 0 to 0 .*: No space left"):
        trainer_of(tmp_path, strategy, limit_val_batches=0).fit(Tiny(), datamodule=ClientsOwnData())
    assert [one.round for one in strategy.relevance] == [0]
    assert strategy.round == 1


@pytest.mark.parametrize("has_url", [True, False])
def test_a_run_that_goes_on_has_the_rounds_of_before(tmp_path, monkeypatch, has_url):
    monkeypatch.setattr("lightning_pfl.federation.round_log._FULL", 1)  # every round is a block

    def run(folder, rounds, **arguments):
        strategy = strategy_of("abc", store=ClientStore(tmp_path / "states") if has_url else None)
        fit(folder, strategy, rounds, module=Tiny(), **arguments)
        return strategy

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    resumed = run(tmp_path / "parts", 4, ckpt_path="last")

    assert [one.round for one in resumed.relevance] == [0, 1, 2, 3]
    for one, other in zip(whole.relevance, resumed.relevance, strict=True):
        assert torch.equal(one.weights, other.weights)
    got, wanted = ([one.by_client for one in strategy.traffic_by_round] for strategy in (resumed, whole))
    assert got == wanted
    assert [one.round for one in resumed.traffic_by_round] == [0, 1, 2, 3]
    assert len(list(tmp_path.glob("states/_relevance/*.rounds"))) == (3 if has_url else 0)
    assert len(list(tmp_path.glob("states/_traffic/*.rounds"))) == (2 if has_url else 0)  # a round ends with the next
