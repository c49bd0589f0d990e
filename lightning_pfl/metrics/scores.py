"""`PersonalizationScores`: how good personalised models are at home, abroad, over time, and for whom not.

Everything comes from one table per evaluated round: client i's model on task j, ``[N, T]``. The functions below take
such tables as tensors; the metric collects them by round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, final

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["PersonalizationScores", "area_under_rounds", "forgetting", "forward_transfer", "mean_over", "worst_decile"]


def mean_over(scores: Tensor, chosen: Tensor) -> Tensor:
    """Each client's mean score over the tasks chosen for it.

    Args:
        scores: shape ``[..., N, T]``; NaN where a task was not evaluated, which leaves it out.
        chosen: bool, shape ``[N, T]``.

    Returns:
        Shape ``[..., N]``; NaN for a client without any chosen and evaluated task.

    Example:
        >>> mean_over(torch.tensor([[0.8, 0.2], [0.1, 0.6]]), torch.eye(2, dtype=torch.bool))
        tensor([0.8000, 0.6000])
    """
    return scores.where(chosen, torch.nan).nanmean(dim=-1)


def area_under_rounds(values: Tensor, rounds: Tensor) -> Tensor:
    """Area under a curve over rounds (trapezoids), divided by the number of rounds that it spans.

    Args:
        values: shape ``[R, ...]``, in the order of ``rounds``.
        rounds: increasing, shape ``[R]``; evaluations need not be evenly spaced.

    Returns:
        Shape ``[...]``, on the scale of the values. One round: its value.

    Source:
        Co-LoRA's A_AUC is the plain mean over the evaluated rounds, as far as its code tells; with even spacing the two
        differ by half a weight of the first and the last round only.

    Example:
        >>> area_under_rounds(torch.tensor([0.0, 0.4, 0.6]), torch.tensor([0, 2, 3]))  # (2 * .2 + 1 * .5) / 3
        tensor(0.3000)
    """
    if len(rounds) == 1:
        return values[0]
    area: Tensor = torch.trapezoid(values, rounds.to(values), dim=0) / (rounds[-1] - rounds[0])
    return area


def forgetting(scores: Tensor, owned: Tensor) -> Tensor:
    """How far each client fell below its own best on its own tasks.

    Args:
        scores: shape ``[R, N, T]``, by round.
        owned: bool, shape ``[N, T]``.

    Returns:
        Shape ``[N]``: per own task the best of the earlier rounds minus the last, averaged over tasks; negative
        where the last round is the best. NaN after a single round.

    Source:
        Chaudhry et al., ECCV 2018, arXiv:1801.10112, equation 3, with rounds for tasks.

    Example:
        >>> one_task = torch.tensor([0.5, 0.9, 0.7])[:, None, None]
        >>> forgetting(one_task, torch.ones(1, 1, dtype=torch.bool))  # .9 - .7
        tensor([0.2000])
    """
    if scores.shape[0] < 2:
        return scores.new_full((scores.shape[1],), torch.nan)
    earlier = scores[:-1].nan_to_num(nan=-torch.inf).amax(dim=0)
    earlier = earlier.where(earlier > -torch.inf, torch.nan)
    return mean_over(earlier - scores[-1], owned)


def forward_transfer(scores: Tensor, rounds: Tensor, starts: Tensor, baseline: Tensor) -> Tensor:
    """How much better each client is at coming tasks, just before they begin, than a model that learned nothing.

    Args:
        scores: shape ``[R, N, T]``, by round, each after that round's training.
        rounds: increasing, shape ``[R]``.
        starts: shape ``[N, T]``, the round in which a client first trains on a task; -1 for tasks that are not its own.
        baseline: shape ``[N, T]``, scores before any training.

    Returns:
        Shape ``[N]``: over the own tasks that begin after an evaluated round, the mean of the score in the last
        evaluated round before the beginning, minus the baseline. NaN for a client without such a task.

    Source:
        Lopez-Paz and Ranzato, NeurIPS 2017, arXiv:1706.08840, equation 4, with rounds for tasks; what they call the
        score at random initialisation is here the base model with adapters that are still zero.

    Example:
        >>> scores = torch.tensor([[[0.5, 0.40]], [[0.6, 0.45]], [[0.6, 0.8]]])  # the second task begins in round 2
        >>> starts, baseline = torch.tensor([[0, 2]]), torch.tensor([[0.2, 0.25]])
        >>> forward_transfer(scores, torch.tensor([0, 1, 2]), starts, baseline)  # .45 - .25
        tensor([0.2000])
    """
    seen_before = torch.full_like(baseline, torch.nan)
    for table, round in zip(scores, rounds.tolist(), strict=True):
        seen_before = torch.where((starts > round) & ~table.isnan(), table, seen_before)
    return mean_over(seen_before - baseline, starts >= 0)


def worst_decile(values: Tensor) -> Tensor:
    """Mean of the lowest tenth of the clients, at least one; clients without a value (NaN) do not count.

    Example:
        >>> worst_decile(torch.tensor([0.5, 0.25, 0.75]))
        tensor(0.2500)
    """
    known = values[~values.isnan()]
    return known.sort().values[: ceil(len(known) / 10)].mean() if len(known) else values.new_tensor(torch.nan)


@final
class PersonalizationScores(Metric):
    r"""Scores of personalised models from the tables of every evaluated round.

    `compute` gives, as scalars on the scale of the scores:

    - ``self_last``: mean over clients of each one's mean over its own tasks, in the last round;
    - ``others_last``: the same over the tasks that are not its own; with ``families`` also ``others_seen_last`` (tasks
      of a family that the client has itself) and ``others_unseen_last``;
    - ``self_auc``, ``others_auc``, ``others_seen_auc``, ``others_unseen_auc``: area under the curve over the evaluated
      rounds (`area_under_rounds`);
    - ``forgetting``: mean over clients of `forgetting`; NaN after one round;
    - ``forward_transfer``, with ``starts``: mean over clients of `forward_transfer`;
    - ``self_worst_decile`` and ``self_std``: `worst_decile` and standard deviation of the clients' own scores in the
      last round: a mean can hide that some pay for others.

    `per_client` gives the same before the mean over clients, `tidy_rows` in `table` every single number. Likelihood
    beside accuracy is a second metric of the same tasks, fed with log-likelihoods. A score that does not exist (nobody
    has an unseen family) is NaN.

    Args:
        tasks: per client the names of its own tasks; the order of the clients is the order of a table's rows.
        all_tasks: the order of a table's columns; None: all tasks in the order in which they first appear in ``tasks``.
        families: per task the name of its family.
        starts: per client and own task the round in which its training on the task begins, from 0 (`Stream.starts`).
        baseline: shape ``[N, T]``, the scores of the models before any training; needed with ``starts``.

    Raises:
        ValueError: a client without a task, a task that is unknown, has no family or no start; in `update`, a table of
            another shape, or a round that was there before.

    Source:
        Self and Others as in Co-LoRA, arXiv:2506.11024. Its Others averages over other clients; here every task
        counts once, and a task that two clients own is nobody's "other" among the two.

    Example:
        >>> metric = PersonalizationScores({"a": ["cats"], "b": ["dogs"]})
        >>> metric.update(torch.tensor([[0.6, 0.2], [0.4, 0.8]]), round=0)
        >>> metric.update(torch.tensor([[0.5, 0.4], [0.2, 0.75]]), round=1)
        >>> scores = metric.compute()
        >>> scores["self_last"], scores["others_last"]  # (.5 + .75) / 2 and (.4 + .2) / 2
        (tensor(0.6250), tensor(0.3000))
        >>> scores["self_auc"], scores["forgetting"]  # half way from .7 to .625; mean of .6 - .5 and .8 - .75
        (tensor(0.6625), tensor(0.0750))
        >>> scores["self_worst_decile"], scores["self_std"]  # client a alone; both are .125 from the mean .625
        (tensor(0.5000), tensor(0.1250))
    """

    higher_is_better = True
    full_state_update = False
    tables: list[Tensor]
    rounds: list[Tensor]

    def __init__(
        self,
        tasks: Mapping[str, Sequence[str]],
        *,
        all_tasks: Sequence[str] | None = None,
        families: Mapping[str, str] | None = None,
        starts: Mapping[str, Mapping[str, int]] | None = None,
        baseline: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for client, own in tasks.items():
            if isinstance(own, str) or not own:
                raise ValueError(f"`tasks` must give client `{client}` a list of at least one task, but has {own!r}.")
        self.client_ids = tuple(tasks)
        self.task_ids = tuple(all_tasks or dict.fromkeys(task for own in tasks.values() for task in own))
        if unknown := sorted({task for own in tasks.values() for task in own} - set(self.task_ids)):
            raise ValueError(f"Every client's tasks must be among `all_tasks`, but {unknown} are not.")
        if families is not None and (homeless := [task for task in self.task_ids if task not in families]):
            raise ValueError(f"`families` must name a family for every task, but has none for {homeless}.")
        self.owned = torch.tensor([[task in tasks[client] for task in self.task_ids] for client in self.client_ids])
        self.related: Tensor | None = None
        if families is not None:
            at_home = [{families[task] for task in tasks[client]} for client in self.client_ids]
            self.related = torch.tensor([[families[task] in mine for task in self.task_ids] for mine in at_home])
        self.families = None if families is None else dict(families)
        self.baseline = baseline
        self.starts = self._starts(tasks, starts, baseline)
        self.add_state("tables", [], dist_reduce_fx="cat")
        self.add_state("rounds", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, *, round: int) -> None:
        """Add one evaluated round.

        Args:
            scores: shape ``[N, T]``, client i's model on task j; NaN where it was not evaluated.
            round: which, from 0; rounds may come in any order.
        """
        if tuple(scores.shape) != tuple(self.owned.shape):
            raise ValueError(
                f"Scores must be a table of {len(self.client_ids)} clients by {len(self.task_ids)} tasks, "
                f"but have shape {tuple(scores.shape)}."
            )
        if any(int(known) == round for known in self.rounds):
            raise ValueError(f"Round {round} has been added before; call `reset()` to start anew.")
        self.tables.append(scores.detach().float()[None])
        self.rounds.append(torch.tensor([round], device=scores.device))

    def compute(self) -> dict[str, Tensor]:
        """All scores by name."""
        own = self.per_client()["self_last"]
        scores = {name: values.nanmean() for name, values in self.per_client().items()}
        scores["self_worst_decile"] = worst_decile(own)
        scores["self_std"] = own[~own.isnan()].std(correction=0)
        return scores

    def per_client(self) -> dict[str, Tensor]:
        """Every score that a client has by itself, by name, shape ``[N]``; NaN where it does not exist for a client."""
        rounds, tables = self.by_round()
        owned = self.owned.to(tables.device)
        curves = {"self": mean_over(tables, owned), "others": mean_over(tables, ~owned)}
        if self.related is not None:
            related = self.related.to(tables.device)
            curves["others_seen"] = mean_over(tables, ~owned & related)
            curves["others_unseen"] = mean_over(tables, ~related)
        scores = {f"{name}_last": curve[-1] for name, curve in curves.items()}
        scores |= {f"{name}_auc": _area_where_known(curve, rounds) for name, curve in curves.items()}
        scores["forgetting"] = forgetting(tables, owned)
        if self.starts is not None:
            assert self.baseline is not None
            starts, baseline = self.starts.to(tables.device), self.baseline.to(tables)
            scores["forward_transfer"] = forward_transfer(tables, rounds, starts, baseline)
        return scores

    def by_round(self) -> tuple[Tensor, Tensor]:
        """The rounds, increasing, shape ``[R]``, and their tables, shape ``[R, N, T]``.

        Raises:
            ValueError: nothing has been added.
        """
        if not self.rounds:
            raise ValueError("There is nothing to compute: no round has been added with `update`.")
        rounds, order = torch.cat(list(self.rounds)).sort()
        return rounds, torch.cat(list(self.tables))[order]

    def _starts(
        self,
        tasks: Mapping[str, Sequence[str]],
        starts: Mapping[str, Mapping[str, int]] | None,
        baseline: Tensor | None,
    ) -> Tensor | None:
        if starts is None:
            return None
        if baseline is None or tuple(baseline.shape) != tuple(self.owned.shape):
            raise ValueError(
                f"`starts` needs a `baseline`: a table of {tuple(self.owned.shape)} scores before any training, but it "
                f"is {None if baseline is None else tuple(baseline.shape)}."
            )
        first = torch.full(self.owned.shape, -1)
        for row, client in enumerate(self.client_ids):
            for task in tasks[client]:
                if task not in starts.get(client, {}):
                    raise ValueError(f"`starts` must say when client `{client}` begins `{task}`, but does not.")
                first[row, self.task_ids.index(task)] = starts[client][task]
        return first


def _area_where_known(curve: Tensor, rounds: Tensor) -> Tensor:
    """`area_under_rounds` of each client's curve ``[R, N]`` over the rounds in which it has a value."""
    areas = curve.new_full((curve.shape[1],), torch.nan)
    for client, values in enumerate(curve.T):
        known = ~values.isnan()
        if known.any():
            areas[client] = area_under_rounds(values[known], rounds[known])
    return areas
