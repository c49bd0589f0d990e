"""Federated runs of a few milliseconds, for tests."""

import lightning as L
import torch

from lightning_pfl.federation import Client, FederatedStrategy, LocalPool


def strategy_of(clients=("a", "b", "c"), **arguments):
    arguments = {"pool": LocalPool(), "share": ["encoder"], **arguments}
    if not isinstance(clients, int):
        clients = [one if isinstance(one, Client) else Client(one) for one in clients]
    return FederatedStrategy(clients, **arguments)


def trainer_of(tmp_path, strategy=None, **arguments):
    defaults = {
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "default_root_dir": str(tmp_path),
    }
    return L.Trainer(strategy=strategy or strategy_of(), **{**defaults, **arguments})


def assert_equal_states(got, expected):
    """Two nests of containers hold the same, tensors bit for bit."""
    assert type(got) is type(expected), (type(got), type(expected))
    if isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected) or (got.isnan() & expected.isnan()).any()
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for name in expected:
            assert_equal_states(got[name], expected[name])
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_equal_states(one, other)
    else:
        assert got == expected
