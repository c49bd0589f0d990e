"""How likely a model finds given continuations: the arithmetic behind choosing among candidate answers.

A candidate's score is the log-likelihood of *all* its tokens, so answers that begin alike are told apart. Let the token
that ends an answer be part of every candidate: without it "red" is never less likely than "red circle", with it the
candidates exclude each other and their likelihoods are shares of one distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["choice_log_probs", "continuation_log_likelihood"]


def continuation_log_likelihood(logits: Tensor, ids: Tensor, continued: Tensor) -> Tensor:
    r"""Sum the log-likelihoods of chosen tokens, :math:`\sum_{t \in C} \log p(x_t \mid x_{<t})`.

    Only the chosen positions' rows are normalised, in float32, since a vocabulary may have 262,144 entries.

    Args:
        logits: of a causal language model, shape ``[n, t, vocabulary]``; position t predicts token t + 1.
        ids: its tokens, shape ``[n, t]``.
        continued: bool, shape ``[n, t]``: which tokens belong to the continuation; the first one cannot.

    Returns:
        In nats, float32, shape ``[n]``; 0 where nothing was chosen.

    Raises:
        ValueError: shapes that do not fit, or a chosen first token, which nothing predicts.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])  # every token has probability 1/2
        >>> continuation_log_likelihood(logits, torch.tensor([[1, 0]]), torch.tensor([[False, True]])).exp()
        tensor([0.5000])
    """
    if logits.shape[:2] != ids.shape or ids.shape != continued.shape:
        raise ValueError(
            "`logits` [n, t, v], `ids` [n, t] and `continued` [n, t] must agree in n and t, but have shapes "
            f"{tuple(logits.shape)}, {tuple(ids.shape)} and {tuple(continued.shape)}."
        )
    if continued[:, 0].any():
        raise ValueError("The first token cannot be part of a continuation: no position predicts it.")
    chosen = continued[:, 1:]
    rows = logits[:, :-1][chosen].float()
    each = rows.log_softmax(dim=-1).gather(1, ids[:, 1:][chosen][:, None]).squeeze(1)
    total = torch.zeros(len(ids), dtype=torch.float32, device=logits.device)
    return total.index_add(0, chosen.nonzero()[:, 0], each)


def choice_log_probs(log_likelihoods: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Turn the candidates' log-likelihoods into log-probabilities among the candidates.

    Args:
        log_likelihoods: shape ``[n, c]``; minus infinity where a question offers fewer candidates.
        lengths: tokens (or characters) per candidate, shape ``[n, c]``, by which to divide first. None: the
            likelihoods as they are, which is what the model believes; long answers are then less likely because there
            are more of them. Dividing takes that away and is no likelihood of anything any more.

    Returns:
        Shape ``[n, c]``, minus infinity where there is no candidate; rows sum to 1 after ``exp``.

    Raises:
        ValueError: NaN, a row without candidates, or a length below 1 of a candidate that exists.

    Example:
        >>> scores = torch.tensor([[-2.0, -3.0]])
        >>> choice_log_probs(scores).argmax().item(), choice_log_probs(scores, torch.tensor([[1, 3]])).argmax().item()
        (0, 1)
    """
    offered = log_likelihoods > -torch.inf
    if log_likelihoods.isnan().any() or not offered.any(dim=1).all():
        row = int((log_likelihoods.isnan().any(dim=1) | ~offered.any(dim=1)).nonzero()[0])
        raise ValueError(
            f"Every question needs a likelihood of at least one candidate and none that is NaN, but row {row} has "
            f"{log_likelihoods[row].tolist()}."
        )
    if lengths is None:
        return log_likelihoods.log_softmax(dim=1)
    if (lengths[offered] < 1).any():
        raise ValueError("Every candidate's length must be at least 1: a candidate has at least one token.")
    scaled = (log_likelihoods / lengths.clamp(min=1)).masked_fill(~offered, -torch.inf)
    return scaled.log_softmax(dim=1)
