"""What the demo shows a person: tables in the terminal, a picture of who learned from whom, everything as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_pfl.demo.plan import Plan
from lightning_pfl.demo.run import DemoResult
from lightning_pfl.demo.scores import Count, Scores, wilson_interval
from lightning_pfl.metrics import draw_relevance

__all__ = ["print_report", "write_report"]


def print_report(plan: Plan, result: DemoResult, console: Console) -> None:
    """Print each client's accuracies under every method, means, and what travelled."""
    for table in _accuracies(plan, result):
        console.print(table)
    console.print(_means(result.scores))
    console.print(_traffic(plan, result))


def write_report(plan: Plan, result: DemoResult, output: Path) -> list[Path]:
    """Write ``results.json``, ``relevance.png`` and one adapter folder per client; return what was written."""
    output.mkdir(parents=True, exist_ok=True)
    written = [output / "results.json"]
    written[0].write_text(json.dumps(_as_json(plan, result), indent=1) + "\n", encoding="utf-8")
    last = result.strategy.relevance[-1]
    if last.weights is not None:
        written.append(output / "relevance.png")
        draw_relevance(last.weights, last.client_ids, written[-1])
    for client in plan.clients:
        written.append(output / "adapters" / client.id)
        result.strategy.export(client.id, written[-1])
    return written


def _accuracies(plan: Plan, result: DemoResult) -> Iterator[Table]:
    """One table for own tasks, one for the others'."""
    for title, count_of in (("own task", Scores.on_own), ("others' tasks", Scores.on_others)):
        table = Table(title=f"Accuracy on {title} in %, [95 % interval]", title_justify="left")
        for name in ("client", "model", "chance", "n", *(scores.method for scores in result.scores)):
            table.add_column(name, justify="left" if name in ("client", "model") else "right", no_wrap=True)
        for client in plan.clients:
            counts = [count_of(scores, client.id) for scores in result.scores]
            tasks = [task for name, task in result.tasks.items() if (name == client.task) == (title == "own task")]
            chance = sum(task.chance for task in tasks) / len(tasks)
            table.add_row(
                client.id, client.model, f"{100 * chance:.0f}", str(counts[0].total), *(map(_interval, counts))
            )
        yield table


def _means(all_scores: Sequence[Scores]) -> Table:
    table = Table(title="Means over clients, in %", title_justify="left")
    table.add_column("method")
    table.add_column("Self (own tasks)", justify="right")
    table.add_column("Others (the others' tasks)", justify="right")
    for scores in all_scores:
        table.add_row(scores.method, f"{100 * scores.self_mean():.1f}", f"{100 * scores.others_mean():.1f}")
    return table


def _traffic(plan: Plan, result: DemoResult) -> Table:
    table = Table(title="Bytes per client over the whole run of the last method", title_justify="left")
    for name in ("client", "sent", "received"):
        table.add_column(name, justify="left" if name == "client" else "right")
    traffic = result.strategy.traffic
    for client in plan.clients:
        table.add_row(client.id, f"{traffic[client.id].up:,}", f"{traffic[client.id].down:,}")
    return table


def _as_json(plan: Plan, result: DemoResult) -> dict[str, object]:
    return {
        "plan": {
            "rounds": plan.rounds,
            "steps": plan.steps,
            "batch_size": plan.batch_size,
            "num_train": plan.num_train,
            "seed": plan.seed,
            "clients": {
                client.id: {"model": plan.models[client.model].name, "task": client.task} for client in plan.clients
            },
        },
        "chance": {name: task.chance for name, task in result.tasks.items()},
        "scores": {
            scores.method: {
                "self": scores.self_mean(),
                "others": scores.others_mean(),
                "right_and_total": {
                    client: {task: [count.right, count.total] for task, count in counts.items()}
                    for client, counts in scores.counts.items()
                },
            }
            for scores in result.scores
        },
    }


def _interval(count: Count) -> str:
    low, high = wilson_interval(count)
    return f"{100 * count.share:5.1f} [{100 * low:.0f}, {100 * high:.0f}]"
