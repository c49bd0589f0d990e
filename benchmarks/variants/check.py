"""The engine's scores against the package's own layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_pfl.adapters import CoLoraConfig, inject
from lightning_pfl.adapters.injection import ADAPTER, adapted_layers
from lightning_pfl.adapters.tensors import bases_of, set_bases
from lightning_pfl.benchmark._compat import keep_last_layers
from lightning_pfl.demo.materials import PackagedMaterials
from lightning_pfl.demo.plan import ModelPlan

from .block import ROLES, Block
from .materials import ALPHA_PER_RANK, MODELS, TASKS, folder


@torch.no_grad()
def largest_difference(
    model: Any, bases: Mapping[str, tuple[Tensor, Tensor]], states: Tensor, options: Tensor, *, seed: int = 0
) -> tuple[float, float]:
    """Of the answers' scores, under two random adapters; and the largest score.

    Args:
        model: a float32 language model that is cut to its last layer.
        bases: A and B per role.
        states: ``[n, t, d]``, what enters that layer.
        options: ``[c]``, tokens of the answers.
        seed: of P and Q.
    """
    rank = len(bases["q"][0])
    generator = torch.Generator().manual_seed(seed)
    P = 0.3 * torch.randn(2, len(ROLES), rank, rank, generator=generator)
    Q = 0.3 * torch.randn(2, len(ROLES), rank, generator=generator)
    block = Block(copy.deepcopy(model), dict(bases), ALPHA_PER_RANK)
    mine = block.logits(block.prefix(states, options, torch.zeros(len(states), dtype=torch.long)), P, Q)
    inject(model, CoLoraConfig(r=rank, alpha=ALPHA_PER_RANK * rank, num_blocks=1, private_layers=False))
    set_bases(model, {where: bases[where.split("/")[-1]] for where in bases_of(model)})
    head, theirs = model.get_output_embeddings().weight[options], []
    for adapter in range(2):
        for _, layer in adapted_layers(model):
            role = ROLES.index(str(layer.colora_address[ADAPTER]).split("/")[-1])
            layer.colora_P[ADAPTER].copy_(P[adapter, role])
            layer.colora_Q[ADAPTER].copy_(Q[adapter, role])
        theirs.append(model.model(inputs_embeds=states, use_cache=False).last_hidden_state[:, -1] @ head.T)
    return float((mine - torch.stack(theirs)).abs().max()), float(mine.abs().max())


def check() -> None:
    """Print the differences on real models and states."""
    bases = torch.load(folder() / "bases-canonical.pt")
    for key, name in MODELS.items():
        model, _ = PackagedMaterials().language_model(ModelPlan(name, num_layers=None, lr=1.0, lr_pq=1.0))
        keep_last_layers(model, 1)
        states, options, _ = torch.load(folder() / f"{key}-{TASKS[0]}-val.pt")
        difference, largest = largest_difference(model.float(), bases[key], states[:8].float(), options)
        print(f"{key}: scores up to {largest:.1f} differ by at most {difference:.1e}")
