"""The suite as scenario files of the published form: clients, their tasks in time, and their models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_pfl.benchmark.suite.catalogue import TASKS
from lightning_pfl.benchmark.weights import GEMMA3_270M, SMOLLM2_135M

NUM_CLIENTS = 10

ASSIGNMENTS: Mapping[str, Sequence[str]] = {
    "suite-smollm2": [SMOLLM2_135M] * NUM_CLIENTS,
    "suite-gemma3": [GEMMA3_270M] * NUM_CLIENTS,
    "suite-mixed": [(SMOLLM2_135M, GEMMA3_270M)[client % 2] for client in range(NUM_CLIENTS)],
}
"""Name of a scenario -> language model of each client. In the mixed one every group of clients has both families."""


def scenario(models: Sequence[str]) -> list[dict[str, Any]]:
    """One entry per client: its id, its data sets in the order of time, its model.

    Args:
        models: language model of each client.

    Raises:
        ValueError: not one model per client.
    """
    if len(models) != NUM_CLIENTS:
        raise ValueError(f"`models` must name one model for each of {NUM_CLIENTS} clients, but has {len(models)}.")
    entries = []
    for client, model in enumerate(models):
        specs = sorted((spec for spec in TASKS if spec.client == client), key=lambda spec: spec.time or 0)
        datasets = [
            {"dataset": spec.name, "subset_id": 0, "type": spec.kind} | ({"metric": "F1"} if spec.open_ended else {})
            for spec in specs
        ]
        entries.append({"client_id": client, "datasets": datasets, "model_id": model})
    return entries


def write_scenarios(folder: Path) -> list[Path]:
    """Write all `ASSIGNMENTS` as JSON files.

    Returns:
        Their paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, models in ASSIGNMENTS.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(scenario(models), indent=1) + "\n", encoding="utf8")
        paths.append(path)
    return paths
