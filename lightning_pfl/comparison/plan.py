"""What a comparison is: one YAML file read into frozen dataclasses.

Start at `Comparison` and `read_comparison`. How much is run stands in a `Protocol`, which several comparisons share:
the file names it by its path, or by the name of a packaged one (`small`, `suite`, `full`, `mini`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped, unused-ignore]

from lightning_pfl.adapters.rules import Rule
from lightning_pfl.methods import Method

__all__ = [
    "Comparison",
    "Language",
    "MethodPlan",
    "Protocol",
    "Role",
    "read_comparison",
    "read_protocol",
    "slug",
    "tuned_path",
]

Role = Literal["local", "control", "baseline", "ablation", "ours"]
"""What a method is in a report: training alone, the same structure without exchange, a published method, ours with one
part off or a control of it, or ours. Differences are taken to the first two and to the best baseline."""


@dataclass(frozen=True)
class Language:
    """A language model and how fast its adapters learn.

    Attributes:
        name: as `benchmark.weights.load_language_model` takes it.
        num_layers: how many of its first layers there are; None: all.
        lr: learning rate of A, B and gates.
        lr_pq: learning rate of P and Q.
    """

    name: str
    num_layers: int | None = None
    lr: float = 5e-3
    lr_pq: float = 2e-2


@dataclass(frozen=True)
class Protocol:
    """How much is run.

    Attributes:
        materials: "suite": real models and the suite's tasks; "families": real models and families of tasks that gain
            from each other's data; "drawn": tiny models and drawn shapes.
        models: by a short key.
        anchor: key of the model that the others are aligned to; it is also the relevance probe.
        kept_layers: only so many last layers are run in training, on states of the others that are computed once;
            None: the whole model in every step.
        num_blocks: `CoLoRA`'s, of the layers that are run.
        rank: of the adapters.
        alpha: their scale is alpha / rank.
        rounds_per_task: rounds that each task lasts, in the order of time (dynamic) or in the mean (static).
        steps: optimizer steps per client and round.
        batch_size: examples per step.
        num_train: training examples per task.
        num_val: validation examples per task, for choices.
        num_self: questions per task that a client is asked of its own tasks.
        num_others: questions per task that a client is asked of all others.
        self_at: after how many rounds own tasks are tested; the last must be all of them.
        others_at: after how many rounds the others' tasks are tested.
        clients: every client's tasks in the order of time, by id, where they are not all that there are.
        times: which of a client's tasks in time are used, from 0.
        num_clients: the first so many clients; None: all.
        probe_every: optimizer steps from one sketch of a client's task to the next.
        public_versions: how often, each time edited in another way, the alignment reads every public picture.
        num_public: public pictures that distillation reads.
        questions_at_once: how many questions a model is asked in one batch.
    """

    materials: Literal["suite", "families", "drawn"]
    models: Mapping[str, Language]
    anchor: str
    kept_layers: int | None
    num_blocks: int
    rank: int
    alpha: float
    rounds_per_task: float
    steps: int
    batch_size: int
    num_train: int
    num_val: int
    num_self: int
    num_others: int
    self_at: Sequence[int]
    others_at: Sequence[int]
    clients: Mapping[str, Sequence[str]] | None = None
    times: Sequence[int] = (0, 1, 2, 3)
    num_clients: int | None = None
    probe_every: int = 4
    public_versions: int = 2
    num_public: int = 64
    questions_at_once: int = 64

    def __post_init__(self) -> None:
        if self.anchor not in self.models:
            raise ValueError(f"`anchor` must be one of the models {sorted(self.models)}, but is {self.anchor!r}.")
        rounds = self.num_rounds
        for name in ("self_at", "others_at"):
            at = getattr(self, name)
            if not at or sorted(set(at)) != list(at) or at[0] < 1 or at[-1] != rounds:
                raise ValueError(
                    f"`{name}` must be increasing numbers of rounds that end with all of them, {rounds}, but is "
                    f"{list(at)}."
                )
        if self.num_others > self.num_self:
            raise ValueError(
                f"`num_others`, {self.num_others}, must not exceed `num_self`, {self.num_self}: others are asked the "
                "first of the same questions."
            )

    @property
    def num_rounds(self) -> int:
        """Of a whole run."""
        return round(self.rounds_per_task * len(self.times))


@dataclass(frozen=True)
class MethodPlan:
    """One method of a comparison.

    Attributes:
        make: function that makes it, such as ``lightning_pfl.methods.ditto``.
        arguments: of that function, by name; objects as ``{class_path: ..., init_args: {...}}``. What every method
            is given by the comparison (adapters, the public set, the true task graph) is left out.
        lr: learning rate of A, B and gates, instead of the models' own.
        lr_pq: learning rate of P and Q, instead of the models' own.
        seeds: only so many of the comparison's seeds, the first ones; None: all.
        role: for the report.
        tune: hyper-parameters to choose among, by name: ``lr``, ``lr_pq`` (for all models) or an argument.
    """

    make: Callable[..., Method]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None
    lr_pq: float | None = None
    seeds: int | None = None
    role: Role = "baseline"
    tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def with_settings(self, settings: Mapping[str, Any]) -> MethodPlan:
        """The same method with other hyper-parameters, by the names that `tune` uses."""
        rates = {name: settings[name] for name in ("lr", "lr_pq") if name in settings}
        others = {name: value for name, value in settings.items() if name not in rates}
        return replace(self, **rates, arguments={**self.arguments, **others})

    def described(self) -> dict[str, Any]:
        """What decides its results, as plain containers."""
        function = f"{self.make.__module__}.{self.make.__qualname__}"
        return {"make": function, "arguments": dict(self.arguments), "lr": self.lr, "lr_pq": self.lr_pq}


@dataclass(frozen=True)
class Comparison:
    """A grid of runs.

    Attributes:
        title: for the report.
        protocol: how much is run.
        scenario: "dynamic": a client's tasks come one after another; "static": mixed.
        assignment: keys of models, dealt out to the clients in turn; one key: all clients have the same.
        aligned_with: further models of the protocol that take part in the alignment, though no client has them, so that
            clients of one model, too, train along directions that models share instead of random ones.
        alignment: function that makes the rule by which models are aligned, such as
            ``lightning_pfl.adapters.rules.papers_alignment``; None: `align`'s default.
        methods: by name as in tables, in the order of tables.
        seeds: of runs; a seed decides which batches are met and what is drawn at random.
        side: which side of the tasks is asked about, "test", or "val" for choices.
        tuned: hyper-parameters that `tune` has chosen, by name of method.
        tune: hyper-parameters to choose among that all methods have; a method's own `tune` goes before.
        tune_budget: how many settings `tune` tries for every method that has several.
        tune_others: how much a point of Others counts when settings are compared, where a point of Self counts 1.
        newcomers: tasks that no client has; after a run one newcomer per task and model starts from the others and
            trains on its own task.
        newcomer_steps: after how many of its optimizer steps a newcomer is tested; 0: before any.
    """

    title: str
    protocol: Protocol
    scenario: Literal["dynamic", "static"]
    assignment: Sequence[str]
    methods: Mapping[str, MethodPlan]
    seeds: Sequence[int]
    side: Literal["test", "val"] = "test"
    tuned: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    tune_budget: int = 6
    tune_others: float = 0.0
    aligned_with: Sequence[str] = ()
    alignment: Callable[[], Rule[Any]] | None = None
    newcomers: Sequence[str] = ()
    newcomer_steps: Sequence[int] = (0, 8, 16, 32, 64)

    def __post_init__(self) -> None:
        known = sorted(self.protocol.models)
        steps = list(self.newcomer_steps)
        if not steps or sorted(set(steps)) != steps or steps[0] < 0:
            raise ValueError(f"`newcomer_steps` must be increasing numbers of steps from 0 on, but is {steps}.")
        if not self.assignment or not set(self.assignment) <= set(known):
            raise ValueError(f"`assignment` must name models of the protocol, {known}, but is {list(self.assignment)}.")
        if not set(self.aligned_with) <= set(known):
            raise ValueError(
                f"`aligned_with` must name models of the protocol, {known}, but is {list(self.aligned_with)}."
            )
        if not self.methods or not self.seeds:
            raise ValueError("A comparison needs at least one method and one seed.")
        paths: dict[str, str] = {}
        for name in self.methods:
            if (other := paths.setdefault(slug(name), name)) != name:
                raise ValueError(f"The methods {other!r} and {name!r} would share a folder. Rename one of them.")
        if unknown := sorted(set(self.tuned) - set(self.methods)):
            raise ValueError(f"`tuned` names {unknown}, but the methods are {list(self.methods)}.")

    def method(self, name: str) -> MethodPlan:
        """A method with its tuned hyper-parameters.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in self.methods:
            raise ValueError(f"There is no method {name!r}. There are {list(self.methods)}.")
        return self.methods[name].with_settings(self.tuned.get(name, {}))

    def runs(self) -> list[tuple[str, int]]:
        """All (method, seed), seed by seed, so that an unfinished sweep has whole columns."""
        return [
            (name, seed)
            for place, seed in enumerate(self.seeds)
            for name, plan in self.methods.items()
            if plan.seeds is None or place < plan.seeds
        ]

    def key(self, name: str) -> str:
        """A digest of all that decides a method's runs, but for the seed: results with another key do not fit."""
        protocol = asdict(self.protocol)
        about: list[Any] = [protocol, self.scenario, list(self.assignment), self.side, self.method(name).described()]
        if self.aligned_with:
            about.append(list(self.aligned_with))
        if self.alignment is not None:
            about.append(repr(self.alignment()))
        if self.newcomers:
            about.append([list(self.newcomers), list(self.newcomer_steps)])
        return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_comparison(path: str | Path) -> Comparison:
    """Read a comparison from YAML.

    Args:
        path: the file. Its ``protocol`` may be a mapping, the path of another YAML file (from the file's own folder)
            or the name of a packaged one; its ``tuned`` a mapping or the path of a file that `tune` wrote, which may
            not be there yet.

    Raises:
        ValueError: what is wrong, and where.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    written = _mapping(path.read_text(encoding="utf8"), path)
    if isinstance(name := written.get("protocol"), str):
        written["protocol"] = _protocol_text(name, path.parent)
    if isinstance(tuned := written.get("tuned"), str):
        file = path.parent / tuned
        chosen = _mapping(file.read_text(encoding="utf8"), file) if file.exists() else {}
        written["tuned"] = {name: chosen[name] for name in chosen if name in written.get("methods", {})}
    methods = _entries(written.get("methods"), "methods", path)
    loose = {name: {part: entry.pop(part, {}) for part in ("arguments", "tune")} for name, entry in methods.items()}
    common, chosen = written.pop("tune", {}), written.pop("tuned", {})
    read: Comparison = _parsed(Comparison, {**written, "methods": methods}, str(path))
    for name, parts in loose.items():
        _entries({name: {}, **{f"{name}: {part}": value for part, value in parts.items()}}, "methods", path)
    plans = {name: replace(plan, **loose[name]) for name, plan in read.methods.items()}
    return replace(read, methods=plans, tune=common, tuned=_entries(chosen, "tuned", path))


def tuned_path(path: str | Path) -> Path:
    """The file that a comparison takes tuned hyper-parameters from.

    Raises:
        ValueError: its file names none.
    """
    path = Path(path)
    named = _mapping(path.read_text(encoding="utf8"), path).get("tuned")
    if not isinstance(named, str):
        raise ValueError(
            f"{path} must name in `tuned` the file that hyper-parameters are written to, but has {named!r}."
        )
    return path.parent / named


def read_protocol(name: str) -> Protocol:
    """A packaged protocol, or one from a file.

    Args:
        name: "small", "suite", "full", "mini", or a path.

    Raises:
        ValueError: there is none.

    Example:
        >>> read_protocol("mini").materials
        'drawn'
    """
    read: Protocol = _parsed(Protocol, _protocol_text(name, Path()), name)
    return read


def slug(name: str) -> str:
    """A method's name as part of a path.

    Example:
        >>> slug("FedAvg, warm start")
        'fedavg-warm-start'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _protocol_text(name: str, folder: Path) -> dict[str, Any]:
    packaged = resources.files("lightning_pfl.comparison") / "protocols"
    places: tuple[Traversable, ...] = (folder / name, packaged / f"{name}.yaml")
    for file in places:
        if file.is_file():
            return _mapping(file.read_text(encoding="utf8"), file)
    names = sorted(one.name[:-5] for one in packaged.iterdir() if one.name.endswith(".yaml"))
    raise ValueError(f"`protocol` must be one of {names}, or the path of a YAML file, but is {name!r}.")


def _entries(written: Any, what: str, where: Any) -> dict[str, dict[str, Any]]:
    """Names and, for each of them, names and values; what the values are is for others to say."""
    if not isinstance(written, dict) or not all(isinstance(entry, dict) for entry in written.values()):
        raise ValueError(
            f"{where}: `{what}` must hold names, and names and values for each of them, but is {written!r}."
        )
    return {str(name): dict(entry) for name, entry in written.items()}


def _mapping(text: str, where: Any) -> dict[str, Any]:
    try:
        read = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{where} must hold names and values, but holds a {type(read).__name__}.")
    return read


def _parsed(kind: type, written: Mapping[str, Any], where: str) -> Any:
    """A dataclass from plain containers; every value is checked against its type."""
    from jsonargparse import ArgumentError, ArgumentParser  # an extra, and slow to import

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "it")
    try:
        chosen = parser.parse_object({"it": dict(written)})
        return parser.instantiate(chosen).it
    except ArgumentError as error:
        raise ValueError(f"{where}: {error}") from error
