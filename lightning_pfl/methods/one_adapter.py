"""Methods whose clients train one adapter: alone, averaged, held near the average, or averaged in part."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_pfl.aggregation import FedAvg, LocalOnly
from lightning_pfl.callbacks.proximal import Proximal
from lightning_pfl.methods.method import Adapters, Method

__all__ = ["fedavg", "fedper", "fedprox", "local_only"]


def local_only(adapters: Adapters) -> Method:
    """Each client trains one adapter at full scale on its own data: supervised fine-tuning, what all have to beat.

    The reference code's ``sft``. It computes a mean there and ignores it; here nothing is sent.

    Args:
        adapters: makes the adapters.

    Example:
        >>> from lightning_pfl.callbacks.colora import CoLoRA
        >>> local_only(CoLoRA).aggregator.uses_global_branch
        False
    """
    return Method("local only", LocalOnly(), (adapters(),))


def fedavg(adapters: Adapters) -> Method:
    r"""FedAvg of adapters, also known as FedIT: :math:`w^{t+1} = \sum_k \frac{n_k}{n} w_k^{t+1}`, and all start there.

    Evaluated after aggregation (``val_loss``) it is one model for all; a client's model after its local training is
    ``val_loss_local``, which is what the reference code calls its score.

    The reference code weighs clients alike; here, as in both papers and the authors' code of FedIT, by their numbers of
    examples.

    Args:
        adapters: makes the adapters.

    Source:
        McMahan et al., AISTATS 2017, arXiv:1602.05629, algorithm 1; of LoRA: Zhang et al. (FedIT), ICASSP 2024,
        arXiv:2305.05644.

    Example:
        >>> from lightning_pfl.callbacks.colora import CoLoRA
        >>> fedavg(CoLoRA).name
        'FedAvg'
    """
    return Method("FedAvg", FedAvg(), (adapters(),))


def fedprox(adapters: Adapters, *, strength: float = 0.01) -> Method:
    r"""FedProx: clients minimise :math:`F_k(w) + \frac{\mu}{2} \lVert w - w^t \rVert^2`, the server averages as FedAvg.

    Clients do equal local work here, so of the paper's two ideas (the other is partial work, with which a turn of fewer
    ``local_steps`` agrees) the proximal term is what differs from `fedavg`. The reference code has no FedProx.

    Args:
        adapters: makes the adapters.
        strength: mu; the paper tries 0.001, 0.01, 0.1 and 1.

    Source:
        Li et al., MLSys 2020, arXiv:1812.06127, equation 2 and algorithm 2.
    """
    return Method("FedProx", FedAvg(), (adapters(), Proximal(strength)))


def fedper(adapters: Adapters, *, keep: Sequence[str]) -> Method:
    """FedPer: base layers are averaged as by FedAvg, personalisation layers stay with their client.

    Both are trained together, in the same steps, and what is kept is never sent. A head in `CoLoRA`'s ``train_also`` is
    kept without being named. The reference code has no FedPer.

    Args:
        adapters: makes the adapters.
        keep: `CoLoRA`'s ``keep``: which adapters stay, by exchange names, such as those of the last block
            (``["main/3/*"]``). Empty: only what `train_also` trains is private.

    Source:
        Arivazhagan et al., arXiv:1912.00818, algorithm 1.
    """
    return Method("FedPer", FedAvg(), (adapters(keep=tuple(keep)),))
