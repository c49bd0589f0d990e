"""Clients, rounds and places: the engine. Start at `FederatedStrategy`."""

from lightning_pfl.federation.client import Client
from lightning_pfl.federation.experts import Experts
from lightning_pfl.federation.personal import Newcomer
from lightning_pfl.federation.pools import ClientPool, LocalPool, Pace, RayPool, SimulatedPool, StackedPool
from lightning_pfl.federation.privacy import Privacy
from lightning_pfl.federation.rules import (
    BelowQuorum,
    Decision,
    DropLate,
    LateResults,
    RetryRound,
    RoundRules,
    Shortfall,
    SkipRound,
    StopRun,
    UseLate,
)
from lightning_pfl.federation.store import ClientStore
from lightning_pfl.federation.strategy import FederatedStrategy

__all__ = [
    "BelowQuorum",
    "Client",
    "ClientPool",
    "ClientStore",
    "Decision",
    "DropLate",
    "Experts",
    "FederatedStrategy",
    "LateResults",
    "LocalPool",
    "Newcomer",
    "Pace",
    "Privacy",
    "RayPool",
    "RetryRound",
    "RoundRules",
    "Shortfall",
    "SimulatedPool",
    "SkipRound",
    "StackedPool",
    "StopRun",
    "UseLate",
]
