"""Scores of answered questions as torchmetrics: candidates by likelihood, generated choices, open answers.

`ChoiceScores` needs no generation and is exact; `GeneratedChoices` and `OpenAnswers` judge what a model wrote. All
three count every question they are given, so that what could not be read shows as a share and not as a gap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_pfl.functional.likelihood import choice_log_probs
from lightning_pfl.metrics.answers import named_choice, token_f1

__all__ = ["ChoiceScores", "GeneratedChoices", "OpenAnswers"]


class _Means(Metric):
    """Sums over questions, divided by their number."""

    full_state_update = False
    num_examples: Tensor

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        for name in self.names:
            self.add_state(f"sum_{name}", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_examples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _add(self, count: int, **sums: float) -> None:
        for name, value in sums.items():
            setattr(self, f"sum_{name}", getattr(self, f"sum_{name}") + value)
        self.num_examples = self.num_examples + count

    def compute(self) -> dict[str, Tensor]:
        """Each mean by name, NaN of nothing, and ``num_examples``."""
        means = {name: (getattr(self, f"sum_{name}") / self.num_examples).float() for name in self.names}
        return {**means, "num_examples": self.num_examples}


@final
class ChoiceScores(_Means):
    """Accuracy and likelihood of the right choice, from the likelihood of every candidate.

    `compute` gives ``accuracy``, ``log_likelihood`` (mean log-probability of the right choice among the candidates, in
    nats: it moves before accuracy does) and ``num_examples``. Candidates that tie for the highest score share the
    credit: a model that prefers nothing scores chance, not how often the first choice is right.

    Example:
        >>> metric = ChoiceScores()
        >>> quarter = torch.tensor([0.25, 0.75]).log()
        >>> metric.update(torch.stack([quarter, quarter]), torch.tensor([1, 0]))
        >>> metric.compute()["accuracy"], metric.compute()["log_likelihood"]  # (ln .75 + ln .25) / 2
        (tensor(0.5000), tensor(-0.8370))
    """

    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("accuracy", "log_likelihood"), **kwargs)

    def update(self, log_likelihoods: Tensor, answer: Tensor, *, lengths: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            log_likelihoods: per candidate, all its tokens, shape ``[n, c]``; minus infinity where there is none.
            answer: index of the right candidate, shape ``[n]``.
            lengths: see `choice_log_probs`; None scores by the likelihood itself.

        Raises:
            ValueError: shapes that do not fit, NaN, or a right answer that is not among the candidates.
        """
        if log_likelihoods.ndim != 2 or answer.shape != log_likelihoods.shape[:1]:
            raise ValueError(
                "`log_likelihoods` must be [n, c] and `answer` [n], but have shapes "
                f"{tuple(log_likelihoods.shape)} and {tuple(answer.shape)}."
            )
        if not len(answer):
            return
        log_probs = choice_log_probs(log_likelihoods.detach().double(), lengths)
        right = log_probs.gather(1, answer[:, None]).squeeze(1)
        if (right == -torch.inf).any():
            row = int((right == -torch.inf).nonzero()[0])
            raise ValueError(
                f"The right answer must be one of the candidates, but in row {row} candidate {int(answer[row])} has no "
                "likelihood (minus infinity, which marks padding)."
            )
        best = log_probs.amax(dim=1)
        credit = (right == best).double() / (log_probs == best[:, None]).sum(dim=1)
        self._add(len(answer), accuracy=float(credit.sum()), log_likelihood=float(right.sum()))


@final
class GeneratedChoices(_Means):
    """Accuracy of generated text on questions with choices, by `named_choice`.

    `compute` gives ``accuracy`` (what cannot be read is wrong), ``unread`` (the share that named no choice, or
    several) and ``num_examples``.

    Example:
        >>> metric = GeneratedChoices()
        >>> metric.update(["It is red.", "no idea"], [["red", "blue"], ["red", "blue"]], ["red", "blue"])
        >>> metric.compute()["accuracy"], metric.compute()["unread"]
        (tensor(0.5000), tensor(0.5000))
    """

    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("accuracy", "unread"), **kwargs)

    def update(self, texts: Sequence[str], choices: Sequence[Sequence[str]], answers: Sequence[str]) -> None:
        """Add a batch: what was written, what was offered, what was right.

        Raises:
            ValueError: lengths that differ, or a right answer that was not offered.
        """
        right = unread = 0
        for text, offered, answer in zip(texts, choices, answers, strict=True):
            if answer not in offered:
                raise ValueError(f"The right answer must be one of the choices {list(offered)}, but is {answer!r}.")
            named = named_choice(text, offered)
            unread += named is None
            right += named is not None and offered[named] == answer
        self._add(len(texts), accuracy=right, unread=unread)


@final
class OpenAnswers(_Means):
    """Mean `token_f1` of generated answers to open questions, and the share that agrees in every word.

    Args:
        special_tokens: taken out of both sides; ``tokenizer.all_special_tokens``.

    Example:
        >>> metric = OpenAnswers(special_tokens=["<s>"])
        >>> metric.update(["<s>7", "<s>3 stars"], ["8", "<s>3"])
        >>> metric.compute()["f1"], metric.compute()["exact"]  # 0 and 2/3
        (tensor(0.3333), tensor(0.))
    """

    higher_is_better = True

    def __init__(self, *, special_tokens: Iterable[str] = (), **kwargs: Any) -> None:
        super().__init__(("f1", "exact"), **kwargs)
        self.special_tokens = tuple(special_tokens)

    def update(self, texts: Sequence[str], targets: Sequence[str]) -> None:
        """Add a batch of written and expected answers.

        Raises:
            ValueError: lengths that differ.
        """
        scores = [
            token_f1(text, target, special_tokens=self.special_tokens)
            for text, target in zip(texts, targets, strict=True)
        ]
        self._add(len(scores), f1=sum(scores), exact=sum(score == 1.0 for score in scores))
