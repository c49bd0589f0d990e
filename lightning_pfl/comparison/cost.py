"""What a sweep will cost in processor time, from a few steps and questions that are measured first.

Start at `estimated`. It is a forecast: what a client's turn takes besides its steps is a constant, and methods differ
by their number of passes only. While a sweep runs, the time left comes from the runs themselves.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_pfl.benchmark.vlm import VisionLanguageModule
from lightning_pfl.comparison.data import answer_outputs, collate_for_client
from lightning_pfl.comparison.making import make_method
from lightning_pfl.comparison.training import Bench, given

__all__ = ["Estimate", "estimated", "print_estimate"]

_TURN = 0.1
"""Seconds that a client's turn, or building its model to ask it, takes besides steps and questions."""


@dataclass(frozen=True)
class Estimate:
    """Of one run of a method, in seconds of processor time.

    Attributes:
        training: of all clients in all rounds.
        evaluation: of all questions.
    """

    training: float
    evaluation: float

    @property
    def total(self) -> float:
        """Both."""
        return self.training + self.evaluation


def estimated(bench: Bench, methods: Sequence[str]) -> dict[str, Estimate]:
    """What one run of each method will cost.

    Args:
        bench: where.
        methods: their names in the comparison.
    """
    comparison, prepared = bench.comparison, bench.prepared
    protocol = comparison.protocol
    step, question = {}, {}
    for client in prepared.clients:
        if client.model not in step:
            module = copy.deepcopy(prepared.modules[client.model])
            given(comparison, prepared, seed=0)["adapters"]().prepare_server(module, global_branch=True)
            task, asked = prepared.train[client.id][0], bench.questions[client.model][0]
            step[client.model] = _step(module, [task[index] for index in range(min(protocol.batch_size, len(task)))])
            count = min(protocol.num_self, len(asked))
            question[client.model] = _timed(functools.partial(asked.right, module, count)) / count
    turns = protocol.num_rounds * len(prepared.clients)
    per_pass = protocol.num_rounds * protocol.steps * sum(step[client.model] for client in prepared.clients)
    times_self, times_others = len(protocol.self_at) + 1, len(protocol.others_at) + 1
    asking = 0.0
    for client in prepared.clients:
        own, others = len(client.tasks), len(prepared.tasks) - len(client.tasks)
        count = times_self * own * protocol.num_self + times_others * others * protocol.num_others
        asking += question[client.model] * count + times_self * _TURN
    found = {}
    for name in dict.fromkeys(methods):
        passes = make_method(comparison.method(name), given(comparison, prepared, seed=0)).passes
        found[name] = Estimate(passes * per_pass + turns * _TURN, asking)
    return found


def print_estimate(costs: Mapping[str, Estimate], todo: Sequence[tuple[str, int]], console: Console) -> None:
    """A table of methods, and the sum over the runs that are to do."""
    table = Table("method", "runs", "training", "evaluation", "a run", title="Processor time, forecast", box=None)
    for name, cost in costs.items():
        count = sum(one == name for one, _ in todo)
        table.add_row(name, str(count), f"{cost.training:.0f} s", f"{cost.evaluation:.0f} s", f"{cost.total:.0f} s")
    console.print(table)
    whole = sum(costs[name].total for name, _ in todo)
    console.print(f"{len(todo)} runs, about {whole / 3600:.1f} hours of one core")


def _step(module: VisionLanguageModule, items: Sequence[dict[str, Tensor]]) -> float:
    """Seconds of a training step, optimizer included."""
    optimizer = torch.optim.AdamW([parameter for parameter in module.parameters() if parameter.requires_grad])

    def step() -> None:
        optimizer.zero_grad()
        answer_outputs(module, collate_for_client(items))[0].backward()
        optimizer.step()

    return _timed(step)


def _timed(function: Callable[[], object], times: int = 3) -> float:
    """The least processor time of some calls, after one that is not counted."""
    function()
    found = []
    for _ in range(times):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return min(found)
