"""Hyper-parameters of every method, chosen with the same budget on the same validation side.

Start at `tune`. A setting is tried by a run like any other, on the validation examples and with a seed of its own, so
that nothing that a choice saw is in the numbers that are reported.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]
from rich.console import Console

from lightning_pfl.comparison.plan import Comparison, MethodPlan
from lightning_pfl.comparison.record import Record, record_path
from lightning_pfl.comparison.scores import last_scores
from lightning_pfl.comparison.sweep import sweep
from lightning_pfl.comparison.training import Bench

__all__ = ["TUNING_SEED", "Trial", "settings_of", "trials_of", "tune", "write_chosen"]

TUNING_SEED = 1000
"""Of all runs that choices are made by; no comparison should report it."""


@dataclass(frozen=True)
class Trial:
    """One setting of one method.

    Attributes:
        method: its name.
        settings: hyper-parameters by name; empty for what the file has.
        name: of the run.
    """

    method: str
    settings: Mapping[str, Any]
    name: str


def settings_of(name: str, plan: MethodPlan, common: Mapping[str, Sequence[Any]], budget: int) -> list[dict[str, Any]]:
    """The settings that are tried: all combinations in an order that the name decides, and no more than the budget.

    Args:
        name: of the method.
        plan: with its own choices.
        common: choices that all methods have.
        budget: how many at most.

    Example:
        >>> from lightning_pfl.methods import ditto
        >>> plan = MethodPlan(ditto, tune={"strength": [0.1, 1.0]})
        >>> found = settings_of("Ditto", plan, {"lr_pq": [0.01, 0.02]}, budget=3)
        >>> len(found), sorted(found[0])
        (3, ['lr_pq', 'strength'])
    """
    choices = {**common, **plan.tune}
    every = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
    random.Random(name).shuffle(every)
    return every[:budget]


def trials_of(comparison: Comparison) -> list[Trial]:
    """All that are run, method by method."""
    trials = []
    for name, plan in comparison.methods.items():
        for settings in settings_of(name, plan, comparison.tune, comparison.tune_budget):
            said = ", ".join(f"{key} {value}" for key, value in settings.items())
            trials.append(Trial(name, settings, f"{name} ({said})" if said else name))
    return trials


def tune(
    comparison: Comparison, folder: Path, *, bench: Callable[[Comparison], Bench], console: Console
) -> dict[str, dict[str, Any]]:
    """Try every setting that is not tried yet, and choose.

    Args:
        comparison: methods and their choices.
        folder: for the runs.
        bench: makes the bench of the comparison whose methods are the trials.
        console: for progress.

    Returns:
        The best settings by method; of equals the first that was tried.
    """
    trials, protocol = trials_of(comparison), comparison.protocol
    end = (protocol.num_rounds,)  # nothing else decides
    num_others = protocol.num_others if comparison.tune_others else 0
    of_trials = replace(
        comparison,
        protocol=replace(protocol, self_at=end, others_at=end, num_others=num_others),
        methods={
            one.name: replace(comparison.methods[one.method].with_settings(one.settings), seeds=None) for one in trials
        },
        seeds=(TUNING_SEED,),
        side="val",
        tuned={},
    )
    sweep(of_trials, folder, of_trials.runs(), bench=lambda: bench(of_trials), console=console)
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for one in trials:
        path = record_path(folder, one.name, TUNING_SEED)
        if not path.exists():  # another process is at it
            console.print(f"{one.name} is not finished; call tune again")
            continue
        own, others = last_scores(Record.read(path.read_text("utf8")))
        value, said = own, f"Self {100 * own:.1f} %"
        if comparison.tune_others:  # else the others' questions were not asked
            value, said = own + comparison.tune_others * others, f"{said}, Others {100 * others:.1f} %"
        console.print(f"{one.name}: {said}")
        if one.method not in best or value > best[one.method][0]:
            best[one.method] = value, dict(one.settings)
    return {name: settings for name, (_, settings) in best.items() if settings}


def write_chosen(chosen: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write settings by method as YAML, in one step; those that the file has of other methods stay."""
    known = yaml.safe_load(path.read_text("utf8")) or {} if path.exists() else {}
    chosen = {**known, **chosen}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    head = "# Chosen by `lightning-pfl benchmark tune`, on the validation side.\n"
    partial.write_text(head + yaml.safe_dump({k: dict(v) for k, v in chosen.items()}, sort_keys=False), encoding="utf8")
    os.replace(partial, path)
