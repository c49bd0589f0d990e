"""What the store keeps of clients, where, and what it refuses."""

import os
import uuid
from pathlib import Path

import fsspec
import pytest
import torch

from lightning_pfl.errors import CheckpointMismatchError
from lightning_pfl.federation.blobs import Blobs
from lightning_pfl.federation.store import ClientStore


@pytest.fixture(params=["temporary", "folder", "memory"])
def url(request, tmp_path):
    return {"temporary": None, "folder": str(tmp_path / "store"), "memory": f"memory://{uuid.uuid4().hex}"}[
        request.param
    ]


@pytest.mark.parametrize("max_memory", [0, 5, 1000])
def test_a_client_gets_back_what_it_put_last(url, max_memory):
    store = ClientStore(url, max_memory=max_memory)
    store.put("ward-3", b"one")
    store.put("ward-7", b"two")
    store.put("ward-3", b"three")

    assert store.get("ward-3") == b"three"
    assert store.get("ward-7") == b"two"
    assert store.get("ward-9") is None
    assert store.ids() == ["ward-3", "ward-7"]
    store.close()


def test_memory_stays_below_its_cap_and_the_rest_is_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = ClientStore(max_memory=1000)

    for number in range(10):
        store.put(f"client-{number}", bytes([number]) * 300)

    assert store.nbytes_in_memory == 900
    assert len(list(tmp_path.rglob("*.state"))) == 7
    assert all(store.get(f"client-{number}") == bytes([number]) * 300 for number in range(10))
    store.close()
    assert not list(tmp_path.iterdir())


def test_a_state_that_grows_or_shrinks_moves_between_memory_and_disk():
    store = ClientStore(max_memory=100)
    for size in (50, 150, 80, 100, 101):
        store.put("ward-3", b"x" * size)
        assert store.get("ward-3") == b"x" * size
        assert store.nbytes_in_memory == (size if size <= 100 else 0)
    store.close()


def test_old_versions_do_not_pile_up(tmp_path):
    store = ClientStore(tmp_path, max_memory=0)
    for number in range(5):
        store.put("ward-3", b"%d" % number)
    assert len(list(tmp_path.rglob("*.state"))) == 1


def test_a_checkpoint_brings_back_the_states_of_its_time(url, tmp_path):
    store = ClientStore(url, max_memory=4)
    store.put("ward-3", b"one")
    store.put("ward-7", b"a")
    torch.save(store.state_dict(), tmp_path / "checkpoint")
    store.put("ward-3", b"later")
    store.put("ward-9", b"new")
    if url is None:
        store.close()

    resumed = ClientStore(url)
    resumed.put("ward-1", b"of no use")
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint", weights_only=True))

    assert resumed.ids() == ["ward-3", "ward-7"]
    assert [resumed.get(client_id) for client_id in resumed.ids()] == [b"one", b"a"]
    resumed.close()


def test_every_kept_checkpoint_can_be_gone_back_to(tmp_path):
    store = ClientStore(tmp_path)
    checkpoints = []
    for number in range(3):
        store.put("ward-3", b"%d" % number)
        checkpoints.append(store.state_dict())

    for number in (1, 0, 2):
        store.load_state_dict(checkpoints[number])
        assert store.get("ward-3") == b"%d" % number


def test_a_store_may_move(tmp_path):
    store = ClientStore(tmp_path / "here")
    store.put("ward-3", b"one")
    checkpoint = store.state_dict()
    (tmp_path / "here").rename(tmp_path / "there")

    moved = ClientStore(tmp_path / "there")
    moved.load_state_dict(checkpoint)
    assert moved.get("ward-3") == b"one"


def test_a_store_that_lacks_what_a_checkpoint_refers_to_says_whose(tmp_path):
    store = ClientStore(tmp_path / "one")
    store.put("ward-3", b"one")
    checkpoint = store.state_dict()

    other = ClientStore(tmp_path / "other")
    other.put("ward-7", b"mine")
    with pytest.raises(CheckpointMismatchError, match=r"lacks those of \['ward-3'\]"):
        other.load_state_dict(checkpoint)
    assert other.get("ward-7") == b"mine"  # refused, so nothing changed
    with pytest.raises(CheckpointMismatchError, match=r"no URL. Pass `store=ClientStore\('.*one'\)`"):
        ClientStore().load_state_dict(checkpoint)


@pytest.mark.parametrize("damage", [b"", b"cut of", b"cut off in the midst!"])
def test_a_damaged_state_is_refused(url, damage):
    store = ClientStore(url, max_memory=0)
    store.put("ward-3", b"cut off in the middle")
    files, root = store.blobs._place("ward-3")
    (path,) = files.find(root)
    files.pipe_file(path, damage)

    with pytest.raises(CheckpointMismatchError, match=r"client `ward-3` is damaged: .*\.state must have the sha256"):
        store.get("ward-3")
    store.close()


def test_a_state_that_is_gone_is_said_so(tmp_path):
    store = ClientStore(tmp_path, max_memory=0)
    store.put("ward-3", b"one")
    next(tmp_path.rglob("*.state")).unlink()
    with pytest.raises(CheckpointMismatchError, match="state of client `ward-3` is gone"):
        store.get("ward-3")


@pytest.mark.parametrize("client_id", ["", ".", "..", "../other", "a/b", "a\\b", "/etc", "a\0b", "a.", "ward 3", "-a"])
def test_an_id_that_leaves_its_folder_is_refused(client_id):
    with pytest.raises(ValueError, match="must consist of 1 to 128 letters"):
        ClientStore().put(client_id, b"")


def test_a_write_that_fails_leaves_the_former_state(tmp_path, monkeypatch):
    store = ClientStore(tmp_path, max_memory=0)
    store.put("ward-3", b"former")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"cannot store the state of client `ward-3` \(3 bytes\): No space left"):
        store.put("ward-3", b"new")

    assert store.get("ward-3") == b"former"
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".state"]


def test_what_lies_under_a_url_outlives_the_store(tmp_path):
    store = ClientStore(tmp_path)
    store.put("ward-3", b"one")
    checkpoint = store.state_dict()
    store.close()

    again = ClientStore(Path(tmp_path))
    again.load_state_dict(checkpoint)
    assert again.get("ward-3") == b"one"


def test_a_client_that_returns_to_an_old_state_keeps_it(tmp_path):
    """Equal bytes are one version: putting them again must not remove them."""
    store = ClientStore(tmp_path, max_memory=0)
    for state in (b"one", b"one", b"two", b"one"):
        store.put("ward-3", state)
        assert store.get("ward-3") == state


def test_nothing_is_written_while_all_fits_into_memory():
    url = f"memory://{uuid.uuid4().hex}"
    store = ClientStore(url)
    store.put("ward-3", b"one")
    assert not fsspec.filesystem("memory").exists(url)
    store.state_dict()
    assert fsspec.filesystem("memory").exists(url)


def test_a_negative_cap_is_refused():
    with pytest.raises(ValueError, match="`max_memory` is a number of bytes, but is -1"):
        ClientStore(max_memory=-1)


@pytest.mark.parametrize("max_memory", [0, 6, 1000])
def test_states_of_several_clients_are_kept_together_or_not_at_all(url, max_memory):
    store = ClientStore(url, max_memory=max_memory)
    store.put_all([("ward-3", b"one"), ("ward-7", b"two")])

    def and_then_none():
        yield "ward-3", b"three"
        yield "ward-9", b"new"
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        store.put_all(and_then_none())

    assert store.ids() == ["ward-3", "ward-7"]
    assert (store.get("ward-3"), store.get("ward-7")) == (b"one", b"two")
    assert store.nbytes_in_memory == {0: 0, 6: 6, 1000: 6}[max_memory]
    store.put_all([("ward-3", b"three")])
    assert store.get("ward-3") == b"three"
    store.close()


@pytest.mark.parametrize("max_memory", [0, 5, 1000])
def test_a_staged_state_counts_once_it_is_accepted(url, max_memory):
    store = ClientStore(url, max_memory=max_memory)
    store.put("ward-3", b"one")
    store.stage("ward-3", b"two")
    store.stage("ward-3", b"three")  # asked again
    store.stage("ward-7", b"new")
    assert (store.get("ward-3"), store.ids(), store.staged()) == (b"one", ["ward-3"], ["ward-3", "ward-7"])
    assert next(value for name, value in store.state_dict().items() if name != "url").keys() == {"ward-3"}

    store.accept(["ward-3", "ward-5"])
    store.drop()

    assert (store.get("ward-3"), store.ids(), store.staged()) == (b"three", ["ward-3"], [])
    assert store.nbytes_in_memory == {0: 0, 5: 5, 1000: 5}[max_memory]


def test_what_is_staged_and_dropped_leaves_no_file_and_takes_none_away(tmp_path):
    store = ClientStore(tmp_path, max_memory=0)
    store.put("ward-3", b"one")
    store.stage("ward-3", b"one")  # nothing to train on: the same bytes
    store.stage("ward-7", b"of a first attempt")
    store.stage("ward-7", b"rejected")
    assert len(list(tmp_path.rglob("*.state"))) == 2

    store.drop()

    assert [path.read_bytes() for path in tmp_path.rglob("*.state")] == [b"one"]
    assert store.get("ward-3") == b"one"


def test_a_state_that_cannot_be_written_is_not_staged_afterwards(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no room")

    store = ClientStore(tmp_path, max_memory=0)
    store.put("ward-3", b"one")
    monkeypatch.setattr(Blobs, "write", full)
    with pytest.raises(OSError, match="no room"):
        store.put_all([("ward-3", b"two")])
    assert store.staged() == []
    assert store.get("ward-3") == b"one"


def test_a_state_that_counts_is_written_once(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(Blobs, "write", lambda self, key, *rest, **_: written.append(key) or True)
    store = ClientStore(tmp_path, max_memory=0)
    store.put_all([("ward-3", b"one"), ("ward-7", b"two")])
    assert len(written) == 2


def test_a_version_that_another_process_wrote_is_never_removed(tmp_path):
    """It may be named by a checkpoint that this process knows nothing of."""
    first = ClientStore(tmp_path, max_memory=0)
    first.put("ward-3", b"of a run that crashed")

    second = ClientStore(tmp_path, max_memory=0)
    second.put("ward-3", b"of a run that crashed")  # the same bytes again, as after a resume
    second.put("ward-3", b"and on")
    second.put("ward-3", b"and on and on")

    assert sorted(path.read_bytes() for path in tmp_path.rglob("*.state")) == [
        b"and on and on",
        b"of a run that crashed",
    ]


def test_versions_are_let_go_when_no_checkpoint_refers_to_them(tmp_path):
    store = ClientStore(tmp_path)
    store.put("ward-3", b"one")
    (first,) = store.state_dict()["versions"].items()
    store.put("ward-3", b"two")
    (second,) = store.state_dict()["versions"].items()

    store.release([first, second])  # the second is still the client's

    assert [path.read_bytes() for path in tmp_path.rglob("*.state")] == [b"two"]
    assert store.get("ward-3") == b"two"
