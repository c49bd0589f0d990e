"""What a turn finds, and what it leaves behind."""

import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from lightning_pfl.federation.pools.isolation import ProcessSettings


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def state(tmp_path):
    """Everything that a nested Trainer or a client's code may change."""
    return {
        "generators": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "grad": torch.is_grad_enabled(),
        "handlers": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)],
        "rank": vars(rank_zero_only).get("rank"),
        "folder": os.getcwd(),
        "seeds": {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")},
    }


def upset(tmp_path):
    draw()
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch.set_grad_enabled(False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    rank_zero_only.rank = 5
    os.chdir(tmp_path)
    os.environ["PL_GLOBAL_SEED"] = os.environ["PL_SEED_WORKERS"] = "1"


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_whatever_a_turn_changes_is_put_back_however_it_ends(tmp_path, error):
    before = state(tmp_path)

    try:
        with ProcessSettings.capture().turn(seed=3, num_threads=2):
            upset(tmp_path)
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt) as caught:
        assert type(caught) is error  # noqa: PT017 - both kinds must pass through

    assert state(tmp_path) == before


def test_a_turn_starts_from_its_seed_wherever_the_caller_stands():
    settings, draws = ProcessSettings.capture(), []
    for _ in range(2):
        draw()
        with settings.turn(seed=3, num_threads=1):
            draws.append(draw())
    with settings.turn(seed=4, num_threads=1):
        draws.append(draw())
    assert draws[0] == draws[1] != draws[2]


def test_seeds_larger_than_numpy_takes_are_seeds():
    with ProcessSettings.capture().turn(seed=2**40 + 1, num_threads=1):
        assert torch.initial_seed() == 2**40 + 1


def test_a_turn_finds_the_users_settings_and_not_the_callers_contexts(monkeypatch):
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    torch.set_default_dtype(torch.float64)
    try:
        settings = ProcessSettings.capture()
    finally:
        torch.set_default_dtype(torch.float32)
    monkeypatch.delenv("PL_SEED_WORKERS")

    with (
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        settings.turn(seed=3, num_threads=2),
    ):
        assert torch.get_default_dtype() is torch.float64
        assert os.environ["PL_SEED_WORKERS"] == "1"
        assert torch.get_num_threads() == 2
        weight = torch.ones(2, 2, requires_grad=True)
        (weight @ weight).sum().backward()  # neither inference mode nor no_grad
        assert weight.grad is not None
        assert (torch.ones(2, 2, dtype=torch.float32) @ torch.ones(2, 2, dtype=torch.float32)).dtype is torch.float32

    assert torch.get_default_dtype() is torch.float32
    assert "PL_SEED_WORKERS" not in os.environ


def test_a_turn_can_run_outside_the_main_thread():
    """Only the main thread may set signal handlers, and what it sets meanwhile is its own business."""
    inside, go_on, errors = threading.Event(), threading.Event(), []

    def turn():
        try:
            with ProcessSettings.capture().turn(seed=3, num_threads=1):
                inside.set()
                go_on.wait(timeout=30)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=turn)
    thread.start()
    inside.wait(timeout=30)
    previous = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        go_on.set()
        thread.join()
        assert not errors
    finally:
        signal.signal(signal.SIGUSR1, previous)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device to be seeded")
def test_seeding_a_turn_leaves_no_note_for_devices_that_are_not_there(monkeypatch):
    """`torch.manual_seed` takes down a stack trace per kind of device: a millisecond, and memory, for every turn."""
    monkeypatch.setattr("traceback.format_stack", lambda *_: pytest.fail("a stack trace was taken down"))

    with ProcessSettings.capture().turn(seed=5, num_threads=1):
        drawn = torch.rand(3)

    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))
