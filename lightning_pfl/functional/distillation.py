"""What a student learns of a teacher's predictions: logits in, losses out.

Start at `divergence`. Models of other vocabularies can teach each other where their predictions are about the same
things; `candidate_log_probs` makes them so for questions with offered answers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

__all__ = ["FLOOR", "PUBLIC", "candidate_log_probs", "divergence", "soft_cross_entropy"]

PUBLIC = "public/"
"""So begin the names under which predictions on public data are exchanged."""

FLOOR = -1e4
"""The log-probability of an answer that is not offered: its probability is 0 in float32 at temperatures up to 90."""


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    r"""How far a student's predictions are from a teacher's, :math:`T^2\, \mathrm{KL}(\sigma(t/T) \Vert \sigma(s/T))`.

    Args:
        student: logits, ``[n, classes]``.
        teacher: logits of the same shape; they are not trained.
        temperature: T, > 0. The factor T^2 keeps the gradient's size when T grows.

    Returns:
        The mean over n, ``[]``.

    Source:
        Hinton et al., arXiv:1503.02531, section 2.1.

    Example:
        >>> same = torch.tensor([[1.0, 2.0]])
        >>> divergence(same, same, 2.0)
        tensor(0.)
    """
    target = log_softmax(teacher.detach() / temperature, dim=-1)
    return kl_div(log_softmax(student / temperature, dim=-1), target, log_target=True, reduction="batchmean") * (
        temperature**2
    )


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Cross-entropy against a teacher's probabilities, :math:`-\sum_c \sigma(t)_c \log \sigma(s)_c`.

    Args:
        student: logits, ``[n, classes]``.
        teacher: logits of the same shape; they are not trained.

    Returns:
        One number per row, ``[n]``.

    Example:
        >>> round(soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[3.0, -1.0]])).item(), 4)  # log 2 whatever t is
        0.6931
    """
    return -(teacher.detach().softmax(dim=-1) * log_softmax(student, dim=-1)).sum(dim=-1)


def candidate_log_probs(logits: Tensor, width: int) -> Tensor:
    """Scores of offered answers as what models of all families can be taught: log-probabilities, all finite.

    Args:
        logits: a score per offered answer, ``[n, c]``: log-likelihoods, or logits of first tokens; minus infinity where
            a question offers fewer.
        width: the largest number of answers that any question of the public set offers, >= c.

    Returns:
        ``[n, width]``, `FLOOR` where there is no answer. Adding a constant to a row of scores changes nothing.

    Raises:
        ValueError: more answers than the width.

    Example:
        >>> candidate_log_probs(torch.tensor([[0.0, 0.0, -torch.inf]]), 4).exp()
        tensor([[0.5000, 0.5000, 0.0000, 0.0000]])
    """
    if logits.shape[1] > width:
        raise ValueError(
            f"The public set's questions must offer at most `width` = {width} answers, but some offer "
            f"{logits.shape[1]}. Pass the largest number, the same on all clients."
        )
    scores = logits.float().log_softmax(dim=1).clamp(min=FLOOR)
    return torch.nn.functional.pad(scores, (0, width - scores.shape[1]), value=FLOOR)
