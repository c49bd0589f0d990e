r"""How much clients take of each other: weight policies. How alike they are is said in `similarity`.

Start at `Softmax`. A weight policy turns what the server knows of its clients (`Peers`) into one
row of mixing weights per client. All policies keep three promises: a row sums to 1, a row holds only clients whose
upload may be mixed (`Peers.sources`, and the client itself if asked), and a row that would be empty is the client's
own: who is alone keeps what it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

__all__ = [
    "FixedMatrix",
    "Peers",
    "SampleCount",
    "Softmax",
    "TaskGraph",
    "TopK",
    "Uniform",
    "WeightPolicy",
]


@dataclass(frozen=True, eq=False)
class Peers:
    """What the server knows of its clients when it decides who takes how much of whom.

    Attributes:
        client_ids: N ids; the order of all rows and columns.
        num_examples: training examples per client.
        sources: per client, whether its upload may be mixed into the others' (False once it is too old).
        similarity: shape ``[N, N]``; None without sketches.
        sketched: per client, whether it has sent a sketch; where it has not, ``similarity`` says nothing.
        ages: per client, how many rounds old its upload is; empty where all are of this round.
        newcomers: ids of clients that have trained nothing yet: they are in no row, their own included, unless there
            is nobody else.

    Example:
        >>> Peers.fresh(["a", "b"], num_examples=[1, 3]).sources
        (True, True)
    """

    client_ids: tuple[str, ...]
    num_examples: tuple[int, ...]
    sources: tuple[bool, ...]
    similarity: Tensor | None = None
    sketched: tuple[bool, ...] = ()
    newcomers: frozenset[str] = frozenset()
    ages: tuple[int, ...] = ()

    @staticmethod
    def fresh(
        client_ids: Sequence[str], *, num_examples: Sequence[int] | None = None, similarity: Tensor | None = None
    ) -> Peers:
        """Clients that all may be mixed, all with a sketch if there is a similarity."""
        count = len(client_ids)
        return Peers(
            client_ids=tuple(client_ids),
            num_examples=tuple(num_examples or [1] * count),
            sources=(True,) * count,
            similarity=similarity,
            sketched=(similarity is not None,) * count,
        )

    def candidates(self, *, include_self: bool) -> Tensor:
        """bool, shape ``[N, N]``: whether row i may hold client j."""
        eye = torch.eye(len(self.client_ids), dtype=torch.bool)
        old = torch.tensor([client not in self.newcomers for client in self.client_ids])
        return ((torch.tensor(self.sources) & ~eye) | (eye & include_self)) & old


class WeightPolicy(ABC):
    """Decides how a client's mixture weighs the clients. Leaves are frozen dataclasses: settings, no memory."""

    @property
    @abstractmethod
    def needs_sketches(self) -> bool:
        """Whether `rows` reads `Peers.similarity`."""

    @abstractmethod
    def rows(self, peers: Peers) -> Tensor:
        """One row of weights per client.

        Args:
            peers: N clients.

        Returns:
            float64, shape ``[N, N]``, entries >= 0, rows sum to 1; a row without candidates is the client's own.

        Raises:
            ValueError: the policy does not know a client.
        """


@final
@dataclass(frozen=True)
class Softmax(WeightPolicy):
    r"""Softmax of the cosines over the other clients, :math:`w_{ij} \propto \exp(z_{ij} / \tau)`.

    A client without a sketch has a uniform row, and counts as an average client in the others' rows.

    Args:
        temperature: :math:`\tau`, > 0; small concentrates.
        standardize: take z as the row's cosines minus their mean, divided by their standard deviation, both over the
            row's candidates, so that the temperature means the same whatever the level and spread of the cosines.
            False: z is the cosine, as in the paper, whose 0.5 then gives nearly uniform rows, since cosines of real
            tasks differ by 0.1 to 0.3.
        include_self: whether a client is a candidate of its own row. The paper leaves it out.
        min_spread: a standard deviation below this counts as this, so that rounding errors are not blown up.

    Raises:
        ValueError: a temperature or a spread that is not positive.

    Source:
        Co-LoRA, arXiv:2506.11024: ``Softmax(0.5, standardize=False)``. Standardised rows are ours.

    Example:
        >>> similarity = torch.tensor([[1.0, 0.9, 0.3], [0.9, 1.0, 0.3], [0.3, 0.3, 1.0]])
        >>> peers = Peers.fresh(["a", "b", "c"], similarity=similarity)
        >>> Softmax(0.5, standardize=False).rows(peers)[0]  # exp(1.8) : exp(0.6)
        tensor([0.0000, 0.7685, 0.2315], dtype=torch.float64)
        >>> Softmax(1.0).rows(peers)[0]  # standardised: z = 1 and -1, so exp(1) : exp(-1)
        tensor([0.0000, 0.8808, 0.1192], dtype=torch.float64)
    """

    temperature: float = 0.5
    standardize: bool = field(default=True, kw_only=True)
    include_self: bool = field(default=False, kw_only=True)
    min_spread: float = field(default=1e-3, kw_only=True)

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not self.min_spread > 0:
            raise ValueError(
                f"`temperature` and `min_spread` must be positive, but are {self.temperature} and {self.min_spread}. "
                "For equal weights take `Uniform()`, for the most similar client alone `TopK(1)`."
            )

    @property
    def needs_sketches(self) -> bool:
        """True: it is all about the cosines."""
        return True

    def rows(self, peers: Peers) -> Tensor:
        """Softmax over each row's candidates."""
        allowed = peers.candidates(include_self=self.include_self)
        logits = (self._scores(peers, allowed) / self.temperature).masked_fill(~allowed, -torch.inf)
        highest = logits.amax(dim=1, keepdim=True).nan_to_num(neginf=0.0)  # a row without candidates has no highest
        return _normalized((logits - highest).exp())

    def _scores(self, peers: Peers, allowed: Tensor) -> Tensor:
        """z, zero on average over a row's candidates and zero where a sketch is missing; float64 ``[N, N]``."""
        if peers.similarity is None:
            return torch.zeros(allowed.shape, dtype=torch.float64)
        sketched = torch.tensor(peers.sketched)
        told = sketched[:, None] & sketched[None, :]
        counted = (allowed & told).double()
        cosines = peers.similarity.double().where(told, 0.0)
        number = counted.sum(dim=1, keepdim=True).clamp(min=1)
        centred = cosines - (cosines * counted).sum(dim=1, keepdim=True) / number
        if self.standardize:
            spread = ((centred**2 * counted).sum(dim=1, keepdim=True) / number).sqrt()
            centred = centred / spread.clamp(min=self.min_spread)
        return centred.where(told, 0.0)


@final
@dataclass(frozen=True)
class Uniform(WeightPolicy):
    """Every candidate counts the same.

    Args:
        include_self: whether a client is a candidate of its own row.

    Example:
        >>> Uniform().rows(Peers.fresh(["a", "b", "c"]))[0]
        tensor([0.0000, 0.5000, 0.5000], dtype=torch.float64)
    """

    include_self: bool = field(default=False, kw_only=True)

    @property
    def needs_sketches(self) -> bool:
        """False."""
        return False

    def rows(self, peers: Peers) -> Tensor:
        """One over the number of candidates."""
        return _normalized(peers.candidates(include_self=self.include_self).double())


@final
@dataclass(frozen=True)
class SampleCount(WeightPolicy):
    """Candidates count by their numbers of training examples, as in FedAvg.

    Args:
        include_self: whether a client is a candidate of its own row.

    Example:
        >>> SampleCount().rows(Peers.fresh(["a", "b", "c"], num_examples=[5, 1, 3]))[0]
        tensor([0.0000, 0.2500, 0.7500], dtype=torch.float64)
    """

    include_self: bool = field(default=False, kw_only=True)

    @property
    def needs_sketches(self) -> bool:
        """False."""
        return False

    def rows(self, peers: Peers) -> Tensor:
        """Examples over the candidates' examples."""
        examples = torch.tensor(peers.num_examples, dtype=torch.float64)
        return _normalized(examples * peers.candidates(include_self=self.include_self))


@final
@dataclass(frozen=True)
class TopK(WeightPolicy):
    """Only the k largest weights of each of another policy's rows; of equal ones the first in order of ids.

    Args:
        k: at most so many clients in a row, >= 1.
        of: the policy whose rows are cut.

    Raises:
        ValueError: k below 1.

    Example:
        >>> TopK(1, SampleCount()).rows(Peers.fresh(["a", "b", "c"], num_examples=[5, 1, 3]))[0]
        tensor([0., 0., 1.], dtype=torch.float64)
    """

    k: int
    of: WeightPolicy = field(default_factory=Softmax)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"`k` must be at least 1, but is {self.k}.")

    @property
    def needs_sketches(self) -> bool:
        """Whether the policy that is cut needs them."""
        return self.of.needs_sketches

    def rows(self, peers: Peers) -> Tensor:
        """The other policy's rows, cut and scaled up to sum to 1."""
        rows = self.of.rows(peers)
        order = rows.argsort(dim=1, descending=True, stable=True)
        kept = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order[:, : self.k], True)
        return _normalized(rows * kept)


@final
@dataclass(frozen=True)
class FixedMatrix(WeightPolicy):
    """Weights that the user has written down.

    Args:
        weights: per client whom it takes from and how much, >= 0; only ratios matter. A pair that is not named
            counts 0; clients that are not there (or too old) drop out of a row and the rest is scaled up.

    Raises:
        ValueError: a negative or non-finite weight; in `rows`, a client without an entry.

    Example:
        >>> policy = FixedMatrix({"a": {"b": 3, "c": 1}, "b": {"a": 1}, "c": {}})
        >>> policy.rows(Peers.fresh(["a", "b", "c"]))
        tensor([[0.0000, 0.7500, 0.2500],
                [1.0000, 0.0000, 0.0000],
                [0.0000, 0.0000, 1.0000]], dtype=torch.float64)
    """

    weights: Mapping[str, Mapping[str, float]]

    def __post_init__(self) -> None:
        for client, row in self.weights.items():
            for other, weight in row.items():
                if not 0 <= weight < float("inf"):
                    raise ValueError(
                        f"A weight must be finite and not negative, but that of `{other}` for `{client}` is {weight}."
                    )

    @property
    def needs_sketches(self) -> bool:
        """False."""
        return False

    def rows(self, peers: Peers) -> Tensor:
        """The user's numbers for the clients that are there."""
        _require_known(peers, self.weights, "the fixed matrix")
        masses = torch.tensor(
            [[float(self.weights[one].get(other, 0.0)) for other in peers.client_ids] for one in peers.client_ids],
            dtype=torch.float64,
        ).reshape(len(peers.client_ids), -1)
        return _normalized(masses * peers.candidates(include_self=True))


@final
@dataclass(frozen=True)
class TaskGraph(WeightPolicy):
    """The oracle: clients count by how many tasks (or families of tasks) they share.

    An upper bound for what relevance can find, for benchmarks, where the tasks of clients are known. A client that
    shares nothing with anybody keeps its own.

    Args:
        tasks: per client the names of its tasks, or of their families.
        include_self: whether a client is a candidate of its own row.

    Raises:
        ValueError: in `rows`, a client without an entry.

    Example:
        >>> policy = TaskGraph({"a": ["flags"], "b": ["flags", "food"], "c": ["food"]})
        >>> policy.rows(Peers.fresh(["a", "b", "c"]))
        tensor([[0.0000, 1.0000, 0.0000],
                [0.5000, 0.0000, 0.5000],
                [0.0000, 1.0000, 0.0000]], dtype=torch.float64)
    """

    tasks: Mapping[str, Collection[str]]
    include_self: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for client, tasks in self.tasks.items():
            if isinstance(tasks, str):
                raise ValueError(f"The tasks of `{client}` must be a collection of names, but are the text {tasks!r}.")

    @property
    def needs_sketches(self) -> bool:
        """False."""
        return False

    def rows(self, peers: Peers) -> Tensor:
        """Number of shared tasks, scaled to sum to 1."""
        _require_known(peers, self.tasks, "the task graph")
        sets = [frozenset(self.tasks[client]) for client in peers.client_ids]
        shared = torch.tensor([[len(one & other) for other in sets] for one in sets], dtype=torch.float64)
        return _normalized(shared.reshape(len(sets), -1) * peers.candidates(include_self=self.include_self))


def _normalized(masses: Tensor) -> Tensor:
    """Divide each row by its sum; a row of zeros becomes the client's own."""
    totals = masses.sum(dim=1, keepdim=True)
    own = torch.eye(masses.shape[0], dtype=masses.dtype)
    return torch.where(totals > 0, masses / totals.where(totals > 0, 1.0), own)


def _require_known(peers: Peers, entries: Collection[str], what: str) -> None:
    if missing := [client for client in peers.client_ids if client not in entries]:
        raise ValueError(f"Every client needs an entry in {what}, but {missing} have none; it holds {sorted(entries)}.")
