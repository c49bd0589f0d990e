"""`FreshStart`: a client's own adapter begins anew whenever the server has taken over what it learned."""

from __future__ import annotations

from typing import Any, final

import lightning as L
import torch
from torch import nn
from typing_extensions import override

from lightning_pfl.adapters.injection import ADAPTER, adapted_layers
from lightning_pfl.callbacks.federated import Exchange
from lightning_pfl.functional.colora import kaiming_rows, seed_from
from lightning_pfl.types import Personalized, SharedTensors

__all__ = ["FreshStart"]


@final
class FreshStart(Exchange):
    """Puts a client's own adapter back to zero when a frozen global branch comes, and forgets the optimizer's moments.

    B, P and Q are zero again, and A of conventional layers is drawn anew, for every client and round by itself. The
    client's model is then the global branch alone, until it trains. It stands after `CoLoRA` and sends nothing of its
    own; schedulers go on.

    Args:
        seed: of the new A.

    Source:
        FLoRA, Wang et al., NeurIPS 2024, arXiv:2409.05976, whose clients begin every round with new LoRA modules.

    Example:
        >>> FreshStart(seed=1).seed
        1
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    @override
    def architecture(self, module: L.LightningModule) -> str:
        """The same for all."""
        return "fresh"

    @override
    def upload(self, module: L.LightningModule) -> SharedTensors:
        """Nothing of its own."""
        return SharedTensors()

    @override
    def receive(self, module: L.LightningModule, personalized: Personalized) -> None:
        """Begin anew, if a global branch has come."""
        if personalized.frozen is not None:
            self._begin(module)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.state.clear()

    @torch.no_grad()
    def _begin(self, module: L.LightningModule) -> None:
        try:
            strategy: Any = module.trainer.strategy
        except RuntimeError:  # what Lightning raises for a module that no Trainer has
            strategy = None
        turn = getattr(strategy, "client_id", None) or "", getattr(strategy, "round", None) or 0
        for name, layer in adapted_layers(module):
            for letter, tensor in layer.local_tensors(ADAPTER).items():
                if letter == "A":
                    rank, width = tensor.shape
                    tensor.copy_(kaiming_rows(rank, width, seed=seed_from(self.seed, *turn, name)))
                else:
                    nn.init.zeros_(tensor)
