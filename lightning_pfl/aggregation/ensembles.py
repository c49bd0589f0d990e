"""How clients' predictions on public data become what clients learn from: the server's half of distillation.

Start at `Ensemble`. A rule that uses one is `Distilled`. Predictions go by names that hold the number of classes
(``"4/logits"``): what has as many classes is about the same classes, so clients of families with other vocabularies
meet where they predict among offered answers, and only there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

__all__ = ["Ensemble", "LowestLoss", "MeanPredictions", "Predictions", "PrototypeMeans"]


@final
@dataclass(frozen=True, eq=False)
class Predictions:
    """What one client predicts on the public set.

    Attributes:
        client_id: whose.
        architecture: as in `ClientUpdate`.
        tensors: by name: ``"<classes>/logits"`` of shape ``[n, classes]`` and, where a method needs them,
            ``"<classes>/losses"`` of shape ``[n]``.
    """

    client_id: str
    architecture: str
    tensors: Mapping[str, Tensor]


class Ensemble(ABC):
    """Decides what clients learn from. Leaves are frozen dataclasses: settings, no memory."""

    @abstractmethod
    def teach(self, told: Sequence[Predictions]) -> dict[str, Tensor]:
        """Make the teachers.

        Args:
            told: what the round's participants predict, sorted by client id.

        Returns:
            Fresh tensors by the names that clients use; a client receives those that it sends itself.

        Raises:
            ValueError: clients with other public sets.
        """


@final
@dataclass(frozen=True)
class MeanPredictions(Ensemble):
    r"""One teacher: the mean of all clients' logits, :math:`\frac1N \sum_k z_k`, each client counting the same.

    Source:
        Lin et al. (FedDF), NeurIPS 2020, arXiv:2006.07242; Xie et al. (PerAda), CVPR 2024, arXiv:2302.06637.

    Example:
        >>> told = [Predictions(name, "tiny", {"1/logits": z * torch.ones(1, 1)}) for name, z in (("a", 1), ("b", 3))]
        >>> MeanPredictions().teach(told)["1/logits"]
        tensor([[2.]])
    """

    @override
    def teach(self, told: Sequence[Predictions]) -> dict[str, Tensor]:
        """The mean by name."""
        return {name: torch.stack(list(found.values())).mean(dim=0) for name, found in _by_name(told).items()}


@final
@dataclass(frozen=True)
class PrototypeMeans(Ensemble):
    r"""A teacher per architecture: the mean of its clients' logits, :math:`\frac{1}{N_m} \sum_{k \in m} z_k`.

    They are sent as ``[architectures, n, classes]``, in an order that is the same for all.

    Source:
        Morafah et al. (TAKFL), NeurIPS 2024, arXiv:2409.18461, where an architecture is called a device prototype.

    Example:
        >>> logits = {"a": ("big", 1.0), "b": ("big", 3.0), "c": ("small", 5.0)}
        >>> told = [Predictions(name, kind, {"1/logits": torch.tensor([[z]])}) for name, (kind, z) in logits.items()]
        >>> PrototypeMeans().teach(told)["1/logits"].flatten()
        tensor([2., 5.])
    """

    @override
    def teach(self, told: Sequence[Predictions]) -> dict[str, Tensor]:
        """The means, stacked by name."""
        kinds = {one.client_id: one.architecture for one in told}
        taught = {}
        for name, found in _by_name(told).items():
            groups: dict[str, list[Tensor]] = {}
            for client, tensor in found.items():
                groups.setdefault(kinds[client], []).append(tensor)
            taught[name] = torch.stack([torch.stack(groups[kind]).mean(dim=0) for kind in sorted(groups)])
        return taught


@final
@dataclass(frozen=True)
class LowestLoss(Ensemble):
    r"""A teacher per prediction: the client whose loss on it is lowest, :math:`k^*_i = \arg\min_k \ell_{ki}`.

    Clients send logits and losses, and receive the chosen client's of both. Of equal losses the first client's counts.

    Source:
        Fan et al. (FedMKT), COLING 2025, arXiv:2406.02224, the server's half of DualMinCE.

    Example:
        >>> told = [
        ...     Predictions(name, "tiny", {"1/logits": z * torch.ones(2, 1), "1/losses": torch.tensor(losses)})
        ...     for name, z, losses in (("a", 1.0, [0.1, 0.9]), ("b", 2.0, [0.2, 0.3]))
        ... ]
        >>> LowestLoss().teach(told)
        {'1/logits': tensor([[1.],
                [2.]]), '1/losses': tensor([0.1000, 0.3000])}
    """

    @override
    def teach(self, told: Sequence[Predictions]) -> dict[str, Tensor]:
        """Rows of the best client each."""
        found, taught = _by_name(told), dict[str, Tensor]()
        for name in found:
            if not name.endswith("/logits"):
                continue
            ranked = name.removesuffix("logits") + "losses"
            if ranked not in found or found[ranked].keys() != found[name].keys():
                raise ValueError(
                    f"To choose teachers by their losses, clients must send `{ranked}` beside `{name}`, but not all "
                    "do. Use the callback `SelectiveTransfer` on all clients."
                )
            losses = torch.stack(list(found[ranked].values()))
            logits = torch.stack([found[name][client] for client in found[ranked]])
            best = losses.argmin(dim=0)
            rows = torch.arange(losses.shape[1])
            taught |= {name: logits[best, rows], ranked: losses[best, rows]}
        return taught


def _by_name(told: Sequence[Predictions]) -> dict[str, dict[str, Tensor]]:
    """Per name, each holder's tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for one in told:
        for name, tensor in one.tensors.items():
            others = found.setdefault(name, {})
            for client, other in others.items():
                if other.shape != tensor.shape:
                    raise ValueError(
                        f"All clients must have the same public set, but `{name}` has the shape {tuple(other.shape)} "
                        f"on `{client}` and {tuple(tensor.shape)} on `{one.client_id}`. Give all the same examples in "
                        "the same order."
                    )
            others[one.client_id] = tensor
    return found
