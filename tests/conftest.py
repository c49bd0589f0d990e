"""What tests of several rooms share."""

import os

import pytest
import torch

torch.set_num_threads(1)  # tests run two at a time on two cores, and the number of threads changes bits


@pytest.fixture(scope="session")
def ray_session():
    """One small Ray for all tests, as starting one takes seconds. A pool takes up to two CPUs of it, so two fit."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home directory
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
