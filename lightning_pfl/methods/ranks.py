"""Methods that average what low-rank adapters compute, or whose clients have unequal ranks."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L

from lightning_pfl.adapters import Additive, FixedGate
from lightning_pfl.aggregation import FedAvg, ProductMean, Stacking
from lightning_pfl.callbacks.fresh_start import FreshStart
from lightning_pfl.callbacks.rank_limit import RankLimit
from lightning_pfl.methods.method import Adapters, Method

__all__ = ["flexlora", "flora", "hetlora"]


def flexlora(adapters: Adapters, *, ranks: Mapping[str, int] | None = None) -> Method:
    r"""FlexLoRA: the server averages what layers compute, :math:`\sum_k \frac{n_k}{n} B_k A_k`, and cuts it to a rank.

    P and Q, whose bases are the same for all, are averaged as they are, which is the same as averaging the products.
    The paper forms the whole matrix and takes its SVD; here the same SVD comes from QR of the stacked factors. With
    unequal ranks each client receives the largest singular values that its rank has room for, as in the paper. With one
    rank factors are given near the old A instead (`ProductMean`), which trains on from B = 0. The reference code has no
    FlexLoRA.

    Args:
        adapters: makes the adapters, of the largest rank.
        ranks: r_k by client id. None: all have the adapters' rank.

    Source:
        Bai et al., NeurIPS 2024, arXiv:2402.11505, algorithm 1.
    """
    rule = FedAvg(conventional=ProductMean(ordered=ranks is not None))
    return Method("FlexLoRA", rule, (adapters(), *_limit(ranks)))


def hetlora(adapters: Adapters, *, ranks: Mapping[str, int], decay: float = 0.99, penalty: float = 0.01) -> Method:
    r"""HETLoRA: clients of unequal rank, which they prune; zero-padded adapters are averaged by their norms.

    Client k trains the first r_k ranks and penalises the last of them (`RankLimit`), which it gives up once they have
    become smaller in a turn; :math:`w^{t+1} = \sum_k s_k w_k / \sum_k s_k` with :math:`s_k = \lVert B_k A_k \rVert_F`,
    and it receives the mean cut to r_k. With ``decay=1`` ranks stay as given.

    One number s_k goes for all layers of a client. The reference code has no HETLoRA.

    Args:
        adapters: makes the adapters, of the largest rank.
        ranks: r_k by client id, where clients begin.
        decay: gamma; the paper's 0.99. The floor of gamma r_k is kept, so a client of 16 ranks gives up one at a time.
        penalty: lambda, of the last ranks. We have not found the paper's value.

    Source:
        Cho et al., EMNLP 2024, arXiv:2401.06432.
    """
    limit = RankLimit(ranks, decay=decay, penalty=penalty)
    return Method("HETLoRA", FedAvg(by_norm=True), (adapters(), limit))


def flora(adapters: Adapters, *, ranks: Mapping[str, int] | None = None) -> Method:
    r"""FLoRA: clients' products are added without error, :math:`W^{t+1} = W^t + \sum_k \frac{n_k}{n} B_k A_k`.

    A sum of products is the product of stacked factors (`Stacking`), so ranks may differ. Clients begin every round
    with a new adapter on top of the sum (`FreshStart`), as in the paper and the authors' code.

    The sum is not written into the base weights, which all clients of a machine share, but held beside them at full
    scale; it computes the same. All ranks have the scale alpha / r of the adapters, where the authors' code gives each
    client alpha = 2 r_k, which is one scale as well. The whole sum is sent every round, not the round's stack, so that
    who has missed a round needs nothing else. The reference code has no FLoRA.

    Args:
        adapters: makes the adapters, of the largest rank.
        ranks: r_k by client id. None: all have the adapters' rank.

    Source:
        Wang et al., NeurIPS 2024, arXiv:2409.05976.
    """
    colora = adapters(gate=FixedGate(Additive(), value=1.0))
    return Method("FLoRA", Stacking(), (colora, FreshStart(), *_limit(ranks)))


def _limit(ranks: Mapping[str, int] | None) -> tuple[L.Callback, ...]:
    return () if ranks is None else (RankLimit(ranks),)
