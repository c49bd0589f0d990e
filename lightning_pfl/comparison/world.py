"""Clients, their tasks in time and how the tasks are related: the suite's, families of tasks, or drawn shapes.

Start at `World`. What a language model or a picture is made of is the demo's `Materials`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import final

from lightning_pfl.benchmark.families import DOMAINS
from lightning_pfl.benchmark.families import build_task as build_family_task
from lightning_pfl.benchmark.suite.catalogue import TASKS, find_task
from lightning_pfl.benchmark.suite.graph import relatedness
from lightning_pfl.benchmark.suite.library import load_library
from lightning_pfl.benchmark.suite.recipes import Sizes, build_task, chance
from lightning_pfl.benchmark.tasks import Task
from lightning_pfl.benchmark.tiny import shape_tasks
from lightning_pfl.comparison.plan import Protocol
from lightning_pfl.demo.materials import Materials, PackagedMaterials
from lightning_pfl.demo.tiny import TinyMaterials

__all__ = ["DrawnWorld", "FamilyWorld", "SuiteWorld", "World", "world_of"]


class World(ABC):
    """Where tasks come from.

    Attributes:
        materials: models, pictures' features, public captions.
    """

    materials: Materials

    @abstractmethod
    def clients(self) -> Mapping[str, Sequence[str]]:
        """Every client's tasks in the order of time, by id."""

    @abstractmethod
    def task(self, name: str, sizes: Sizes) -> Task:
        """The first so many examples of a task."""

    @abstractmethod
    def relatedness(self, tasks: Sequence[str]) -> list[list[float]]:
        """How related tasks are in truth, 0 to 1, ``[n][n]`` with ones on the diagonal."""

    def chance(self, task: Task) -> float:
        """Accuracy of answering without looking."""
        return chance(task)


@final
class SuiteWorld(World):
    """The offline suite of forty tasks, on real models."""

    def __init__(self) -> None:
        self.materials = PackagedMaterials()

    def clients(self) -> Mapping[str, Sequence[str]]:
        """Ten clients with four tasks each."""
        tasks: dict[str, list[str]] = {}
        for spec in sorted(TASKS, key=lambda spec: (spec.client or 0, spec.time or 0)):
            tasks.setdefault(f"client-{spec.client}", []).append(spec.id)
        return tasks

    def task(self, name: str, sizes: Sizes) -> Task:
        """Built from its recipe."""
        return build_task(find_task(name), load_library(), sizes)

    def relatedness(self, tasks: Sequence[str]) -> list[list[float]]:
        """The suite's graph."""
        return relatedness(tasks)


@final
class FamilyWorld(World):
    """Twenty clients on five families of tasks that gain from each other's data, on real models.

    Four clients, each in a domain of its own, have a family at the same time; then all go on to the next family, in the
    next domain. Models dealt out in turn give a client one relative on its own model and two on the other, and every
    task is learnt by both models, at different times.
    """

    _FAMILIES = ("kind", "defect", "place", "count", "shape")

    def __init__(self) -> None:
        self.materials = PackagedMaterials()
        self._built: dict[str, Task] = {}

    def clients(self) -> Mapping[str, Sequence[str]]:
        """Two tasks each."""
        tasks: dict[str, Sequence[str]] = {}
        for place, family in enumerate(self._FAMILIES):
            following = self._FAMILIES[(place + 1) % len(self._FAMILIES)]
            for number, domain in enumerate(DOMAINS[family]):
                later = DOMAINS[following][(number + 1) % len(DOMAINS[following])]
                tasks[f"{family}-{domain}"] = (f"{family}-{domain}", f"{following}-{later}")
        return tasks

    def task(self, name: str, sizes: Sizes) -> Task:
        """Of any family and domain, ``kind-fluent``; built once."""
        if name not in self._built:
            family, _, domain = name.partition("-")
            self._built[name] = build_family_task(family, domain)
        return _cut(self._built[name], sizes)

    def relatedness(self, tasks: Sequence[str]) -> list[list[float]]:
        """1 within a family."""
        return _same_family(tasks)


@final
class DrawnWorld(World):
    """Four clients that are asked for colours and shapes on backgrounds of their own, on tiny random models.

    Args:
        folder: where pictures are drawn.
    """

    _GREYS = (255, 200, 140, 80)

    def __init__(self, folder: Path) -> None:
        self.materials = TinyMaterials(folder)
        self._folder = folder
        self._drawn: dict[int, dict[str, Task]] = {}

    def clients(self) -> Mapping[str, Sequence[str]]:
        """Two are asked for colours first, two for shapes first."""
        pairs = [(f"colour-{grey}", f"shape-{grey}") for grey in self._GREYS]
        return {f"client-{place}": pair[:: -1 if place // 2 else 1] for place, pair in enumerate(pairs)}

    def task(self, name: str, sizes: Sizes) -> Task:
        """Drawn once."""
        count = max(sizes.train, 2 * sizes.val, 2 * sizes.test)
        if count not in self._drawn:
            drawn = shape_tasks(self._folder / f"tasks-{count}", backgrounds=self._GREYS, num_examples=count)
            self._drawn[count] = {task.name: task for task in drawn}
        return _cut(self._drawn[count][name], sizes)

    def relatedness(self, tasks: Sequence[str]) -> list[list[float]]:
        """1 where both ask for the same."""
        return _same_family(tasks)


def world_of(protocol: Protocol, folder: Path) -> World:
    """The world that a protocol asks for; what is drawn lies below the folder."""
    if protocol.materials == "drawn":
        return DrawnWorld(folder / "drawn")
    return SuiteWorld() if protocol.materials == "suite" else FamilyWorld()


def _cut(task: Task, sizes: Sizes) -> Task:
    """The first so many examples."""
    sides = task.train[: sizes.train], task.val[: sizes.val], task.test[: sizes.test]
    return Task(task.name, task.family, *sides, task.licences)


def _same_family(tasks: Sequence[str]) -> list[list[float]]:
    families = [task.split("-")[0] for task in tasks]
    return [[float(one == two) for two in families] for one in families]
