"""What a client gets when it loads a snapshot, and what it cannot do to others."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import cloudpickle
import lightning as L
import numpy as np
import pytest
import torch

from lightning_pfl.federation.snapshot import Snapshot
from lightning_pfl.federation.tensor_file import TensorFile

SIDE = 200  # a float32 square of this side is larger than the 64 KiB from which on tensors go to the file


@pytest.fixture
def file(tmp_path):
    with TensorFile(tmp_path) as file:
        yield file


def big(seed=0, dtype=torch.float32):
    return torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def least_cpu_time(work):
    """Of ten times, so that a busy machine does not decide."""
    times = []
    for _ in range(10):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
@pytest.mark.parametrize("side", [3, 2 * SIDE])
def test_every_dtype_comes_back_bit_for_bit(file, dtype, side):
    tensor = torch.randn(side, side).to(dtype)

    again = Snapshot.take(tensor, file).load()

    assert again.dtype is dtype
    assert torch.equal(bits(again), bits(tensor))


def test_a_module_comes_back_with_its_parameters_ties_and_flags(file):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(SIDE, SIDE)
            self.embedding = torch.nn.Embedding(SIDE, SIDE)
            self.head.weight = self.embedding.weight
            self.frozen = torch.nn.Parameter(big(1), requires_grad=False)
            self.small = torch.nn.Parameter(torch.ones(2))
            self.small.note = "kept"
            self.register_buffer("mean", big(2), persistent=False)

    model = Model()
    again = Snapshot.take(model, file).load()

    assert again.head.weight is again.embedding.weight
    assert type(again.frozen) is torch.nn.Parameter
    assert [parameter.requires_grad for parameter in again.parameters()] == [
        parameter.requires_grad for parameter in model.parameters()
    ]
    assert again.small.note == "kept"
    assert "mean" not in again.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert torch.equal(again.mean, model.mean)


@pytest.mark.parametrize("side", [4, SIDE])
def test_views_of_one_storage_stay_views_of_one_storage(file, side):
    whole = torch.arange(float(side * side)).view(side, side)
    original = {"whole": whole, "transposed": whole.t(), "row": whole[1], "strided": whole[::2, 1:3]}

    again = Snapshot.take(original, file).load()

    for name, view in original.items():
        assert torch.equal(again[name], view)
        assert again[name].stride() == view.stride()
    again["row"].fill_(-1)
    assert (again["transposed"][:, 1] == -1).all()
    assert (again["whole"][1] == -1).all()


def test_tensors_that_are_only_equal_stay_apart(file):
    """A teacher that starts as a copy of its student must not train along."""
    student, teacher = big(), big()

    student, teacher = Snapshot.take((student, teacher), file).load()
    student.zero_()

    assert torch.equal(teacher, big())


def test_what_a_client_writes_in_place_reaches_nobody(file):
    model = torch.nn.Linear(SIDE, SIDE)
    before = model.weight.detach().clone()
    snapshot = Snapshot.take(model, file)

    first = snapshot.load()
    second = snapshot.load()
    with torch.no_grad():
        first.weight.add_(1)
    third = snapshot.load()

    for other in (model, second, third):
        assert torch.equal(other.weight, before)
    assert torch.equal(first.weight, before + 1)


def test_a_large_backbone_is_not_in_the_pickle_and_loads_at_once(file):
    model = torch.nn.Sequential(*[torch.nn.Linear(512, 512, bias=False) for _ in range(16)])

    snapshot = Snapshot.take(model, file)
    copied = cloudpickle.dumps(model)

    assert len(copied) > 16 * 2**20
    assert len(cloudpickle.dumps(snapshot)) < 16 * 1024
    assert least_cpu_time(snapshot.load) < least_cpu_time(lambda: cloudpickle.loads(copied)) / 3


def test_tensors_that_snapshots_have_in_common_are_stored_once(file):
    backbone = big()

    one = Snapshot.take({"backbone": backbone, "head": big(1)}, file)
    size = file.nbytes
    other = Snapshot.take({"backbone": backbone, "head": big(2)}, file)

    assert file.nbytes - size == big(2).nbytes
    assert torch.equal(one.load()["backbone"], other.load()["backbone"])
    assert torch.equal(one.load()["head"], big(1))
    assert torch.equal(other.load()["head"], big(2))


def test_a_tensor_changed_between_two_snapshots_is_stored_anew(file):
    """Writing through `.data` bumps no version counter, so only the bytes can tell."""
    parameter = torch.nn.Parameter(big())
    first = Snapshot.take(parameter, file)
    parameter.data.zero_()
    second = Snapshot.take(parameter, file)

    assert torch.equal(first.load(), big())
    assert not second.load().any()


def test_numpy_arrays_go_to_the_file_too_and_are_isolated(file):
    rows = np.arange(100_000, dtype=np.float64)

    snapshot = Snapshot.take({"rows": rows, "labels": np.arange(3)}, file)
    first, second = snapshot.load(), snapshot.load()
    first["rows"][:] = 0

    assert snapshot.nbytes < 2_000
    np.testing.assert_array_equal(second["rows"], rows)
    np.testing.assert_array_equal(second["labels"], [0, 1, 2])


def test_what_has_no_plain_storage_is_left_to_torch(file):
    class Marked(torch.Tensor):
        pass

    original = {
        "sparse": torch.eye(SIDE).to_sparse(),
        "subclass": big().as_subclass(Marked),
        "meta": torch.empty(SIDE, SIDE, device="meta"),
        "conjugate": torch.randn(SIDE, SIDE, dtype=torch.complex64).conj(),
        "empty": torch.empty(0, 3),
        "leaf": big().requires_grad_(),
    }
    original["leaf"].note = "kept"

    again = Snapshot.take(original, file).load()

    assert torch.equal(again["sparse"].to_dense(), torch.eye(SIDE))
    assert type(again["subclass"]) is Marked
    assert torch.equal(again["subclass"].as_subclass(torch.Tensor), big())
    assert again["meta"].device.type == "meta"
    assert torch.equal(again["conjugate"], original["conjugate"])
    assert again["empty"].shape == (0, 3)
    assert again["leaf"].requires_grad
    assert again["leaf"].note == "kept"
    assert not again["empty"].requires_grad


def test_two_empty_tensors_grow_apart(file):
    first, second = Snapshot.take((torch.empty(0), torch.empty(0)), file).load()
    first.resize_(2).fill_(1)
    second.resize_(2).fill_(2)
    assert first.tolist() == [1, 1]


def test_trainer_module_and_datamodule_still_know_each_other(file, tmp_path):
    class Module(L.LightningModule):  # local to a function: only cloudpickle can do that
        pass

    trainer, module, data = L.Trainer(logger=False, default_root_dir=tmp_path), Module(), L.LightningDataModule()
    data.module = module

    trainer, module, data = Snapshot.take((trainer, module, data), file).load()

    assert isinstance(trainer, L.Trainer)
    assert data.module is module


def test_what_cannot_be_pickled_is_named(file):
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.connections = [threading.Lock()]

    with pytest.raises(TypeError, match=r"`module\.connections\[0\]`: cannot pickle '_thread.lock'.* in `setup`"):
        Snapshot.take((L.Trainer(logger=False), Module(), None), file)


def test_the_file_goes_with_the_run_but_what_is_loaded_stays(tmp_path):
    with TensorFile(tmp_path) as file:
        snapshot = Snapshot.take(big(), file)
        loaded = snapshot.load()
        assert list(tmp_path.iterdir())

    assert not list(tmp_path.iterdir())
    assert torch.equal(loaded, big())
    with pytest.raises(FileNotFoundError, match=r"gone.*take a new snapshot"):
        snapshot.load()


def test_a_file_that_was_cut_off_is_refused_and_does_not_crash_the_process(file):
    """Reading behind the end of a mapped file is a SIGBUS."""
    snapshot = Snapshot.take(big(), file)
    os.truncate(file.path, 1000)

    with pytest.raises(ValueError, match=r"must hold 160000 bytes, but has 1000"):
        snapshot.load()


@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_nothing_is_left_on_the_disk_however_the_run_ends(tmp_path, how):
    program = textwrap.dedent(f"""
        import os, signal, time, torch
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
        from lightning_pfl.federation.snapshot import Snapshot
        from lightning_pfl.federation.tensor_file import TensorFile
        file = TensorFile({str(tmp_path)!r})
        snapshot = Snapshot.take(torch.ones(100_000), file)
        if os.fork() == 0:
            raise SystemExit  # a child that ends must not take the file along
        os.wait()
        snapshot.load()
        print("ready", flush=True)
        time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(getattr(signal, how))
    process.communicate(timeout=60)

    if how == "SIGKILL":
        (left,) = tmp_path.iterdir()
        os.utime(left, (0, 0))  # a folder of the last minute might be about to be locked
        TensorFile(tmp_path).close()  # the next run cleans up
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_so(monkeypatch, tmp_path):
    with TensorFile(tmp_path) as file, open("/dev/full", "wb") as full:
        monkeypatch.setattr(file, "_file", full)
        with pytest.raises(OSError, match=r"cannot write 160000 bytes.*TMPDIR"):
            Snapshot.take(big(), file)


def test_a_folder_in_use_is_not_swept(tmp_path):
    with TensorFile(tmp_path) as file:
        os.utime(Path(file.path).parent, (0, 0))
        TensorFile(tmp_path).close()
        assert Path(file.path).exists()
