"""Places where clients' turns run: this process, or Ray actors on one machine or many."""

from lightning_pfl.federation.pools.base import ClientPool
from lightning_pfl.federation.pools.local import LocalPool
from lightning_pfl.federation.pools.ray import RayPool
from lightning_pfl.federation.pools.simulated import Pace, SimulatedPool
from lightning_pfl.federation.pools.stacked import StackedPool

__all__ = ["ClientPool", "LocalPool", "Pace", "RayPool", "SimulatedPool", "StackedPool"]
