"""Clients, rounds and places: the engine. Start at `FederatedStrategy`."""

from lightning_pfl.federation.client import Client
from lightning_pfl.federation.pools import ClientPool, LocalPool, RayPool
from lightning_pfl.federation.store import ClientStore
from lightning_pfl.federation.strategy import FederatedStrategy

__all__ = ["Client", "ClientPool", "ClientStore", "FederatedStrategy", "LocalPool", "RayPool"]
