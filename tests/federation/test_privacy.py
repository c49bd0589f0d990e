"""What leaves a client with noise, what it costs, and that nothing leaves beyond the budget."""

import builtins
import logging
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_pfl.aggregation import FedAvg, LocalOnly, UniformAggregator
from lightning_pfl.callbacks.relevance_probe import RelevanceProbe
from lightning_pfl.errors import CheckpointMismatchError, ClientFailedError, PrivacyBudgetError
from lightning_pfl.federation import ClientStore, Privacy
from lightning_pfl.federation.ledgers import Ledgers
from lightning_pfl.federation.privacy import Permit, charged, release
from lightning_pfl.federation.turn import run_job, unpack_state
from lightning_pfl.functional.accounting import Account, Ledger, PrivacyBudget
from lightning_pfl.functional.mechanisms import ClientNoise, ExampleNoise, UpdateNoise
from lightning_pfl.relevance import GradientProbe
from lightning_pfl.types import ClientUpdate, FlatTensors, SharedTensors
from tests.federation.runs import assert_equal_states, strategy_of, trainer_of
from tests.federation.test_resume import fit, outcome
from tests.federation.test_strategy import FixedSketch, colora
from tests.federation.tiny import Blocks, ClientsOwnData, Tiny

DELTA = 1e-5
PLENTY = PrivacyBudget(epsilon=1000, delta=DELTA)
FAINT = 1e-9  # a multiplier so small that what is sent shows what was to be hidden


def probe(**arguments):
    def loss(module, batch):
        return nn.functional.mse_loss(module(batch[0]), batch[1])

    torch.manual_seed(0)
    return RelevanceProbe(
        GradientProbe(nn.Linear(4, 1), loss, parameters=["weight"], size=8, **arguments), every_n_steps=1
    )


def lasting(rounds, multiplier=4.0, kinds=1):
    """A budget for some rounds and no more."""
    epsilon = Account().add(multiplier, times=rounds * kinds).epsilon(DELTA)
    return PrivacyBudget(epsilon, DELTA)


class Keep(UniformAggregator if False else LocalOnly):
    pass
