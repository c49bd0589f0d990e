"""Functions that take turns."""

import random
import threading

import numpy as np
import pytest
import torch

from lightning_pfl.federation.pools.baton import Runner
from lightning_pfl.federation.pools.isolation import Surroundings


class Stopped(BaseException):
    pass


def runner_of(work):
    """Of a function that is given what pauses it."""
    runner = Runner(lambda: work(runner.pause), Surroundings.capture(), Stopped)
    return runner


def draw():
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item(), torch.get_default_dtype()


def seeded(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def test_what_the_process_has_one_of_is_each_runners_own():
    """The second draw of `randn` comes from a number that numpy has kept from the first."""

    def work(seed):
        def run(pause):
            seeded(seed)
            torch.set_default_dtype(torch.float64 if seed else torch.float32)
            draws = []
            for _ in range(3):
                draws.append(draw())
                pause()
            return draws

        return run

    alone = []
    for seed in range(2):
        with Surroundings.kept():
            alone.append(work(seed)(lambda: None))

    with Surroundings.kept():
        runners = [runner_of(work(seed)) for seed in range(2)]
        while not all([runner.run_on() for runner in runners]):
            draw()  # whoever drives them draws, too
    assert [runner.outcome() for runner in runners] == alone


def test_what_a_runner_raises_is_raised_where_its_outcome_is_asked_for():
    runner = runner_of(lambda pause: 1 / 0)
    assert runner.run_on()
    with pytest.raises(ZeroDivisionError):
        runner.outcome()


def test_a_runner_is_stopped_where_it_waits():
    noted = []

    def work(pause):
        try:
            pause()
        except Stopped:
            noted.append(threading.current_thread())
            raise

    runner = runner_of(work)
    assert not runner.run_on()
    runner.stop()
    assert len(noted) == 1
    assert not noted[0].is_alive()


def test_a_runner_is_stopped_where_it_works():
    """As Ctrl-C leaves it: whoever waited for it does not wait any more."""
    at_work, noted = threading.Event(), []

    def work(pause):
        try:
            while True:
                at_work.set()
        except Stopped:
            noted.append("stopped")
            raise

    runner = runner_of(work)
    waiting = threading.Thread(target=runner.run_on)
    waiting.start()
    at_work.wait(timeout=30)
    runner.stop()
    waiting.join(timeout=30)
    assert noted == ["stopped"]
    runner.stop()  # again does nothing
    runner_of(work).stop()  # nor does one that has not begun
