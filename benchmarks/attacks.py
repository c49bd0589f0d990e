"""What a few lying clients cost the honest ones, by attack and by rule.

    python -m benchmarks.attacks            # the tables of docs/reliability.md, five minutes
    python -m benchmarks.attacks --seeds 1

Twenty clients with two model widths and five families of tasks learn to classify; four of them attack. A client's model
is a Co-LoRA layer (P and Q shared by all) beside a conventional one (A and B shared by its architecture) under a fixed
head, trained on 100 examples of its own and tested on 2,000. Attackers know everything the honest clients send. The
guard of a federation looks at every round. A number is the mean accuracy of the honest clients in percent, minus the
same run in which the attackers behave, paired over seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_pfl.aggregation import (
    Aggregator,
    FedAvg,
    LocalOnly,
    RelevanceAggregator,
    RobustAggregator,
    UniformAggregator,
)
from lightning_pfl.aggregation.faults import Expectation
from lightning_pfl.aggregation.robust_rules import ClippedRelevance, CoordinateMedian, Krum, RobustRule, TrimmedMean
from lightning_pfl.types import ClientUpdate, FlatTensors, SharedTensors

Update = ClientUpdate
Attack = Callable[[list[Update], list[Update]], list[Update]]


@dataclass(frozen=True)
class Protocol:
    """Sizes; a family of tasks has clients of both widths."""

    num_clients: int = 20
    num_attackers: int = 4
    num_families: int = 5
    widths: tuple[int, ...] = (24, 40)
    rank: int = 8
    num_classes: int = 6
    train: int = 100
    test: int = 2000
    rounds: int = 8
    steps: int = 10
    lr: float = 0.01
    label_noise: float = 0.15
    shared: float = 0.4  # how much of a task all clients have in common, and how much its family alone
    private: float = 0.9

    @property
    def ids(self) -> list[str]:
        return [f"client-{index:02d}" for index in range(self.num_clients)]

    @property
    def attackers(self) -> frozenset[str]:
        """In different families, of both widths."""
        return frozenset(self.ids[-self.num_attackers :]) if self.num_attackers else frozenset()


@dataclass
class Group:
    """Clients of one width, trained side by side; a leading dimension per client."""

    ids: list[str]
    width: int
    encode: Tensor  # [rank, width], aligned: every width finds the same coordinates
    head: Tensor  # [classes, rank]
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    local: dict[str, Tensor]
    frozen: dict[str, Tensor]
    optimizer: torch.optim.Optimizer

    def logits(self, x: Tensor, *, branches: bool) -> Tensor:
        """[clients, examples, classes]; both branches at half scale, or one at full."""
        own = {
            name: tensor + self.frozen[name] if branches and name in "PQ" else 2 * tensor if name in "PQ" else tensor
            for name, tensor in self.local.items()
        }
        z = x @ self.encode.T
        shared = (z @ own["P"].transpose(1, 2) + own["Q"][:, None]) @ self.head.T
        scale = 1.0 if branches else 2.0
        result = shared + scale * x @ own["A"].transpose(1, 2) @ own["B"].transpose(1, 2)
        if branches:
            result = result + x @ self.frozen["A"].transpose(1, 2) @ self.frozen["B"].transpose(1, 2)
        return result

    def fit(self, steps: int, *, branches: bool) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = cross_entropy(self.logits(self.x, branches=branches).flatten(0, 1), self.y.flatten())
            (loss * len(self.ids)).backward()
            self.optimizer.step()

    @torch.no_grad()
    def accuracy(self, *, branches: bool) -> dict[str, float]:
        right = (self.logits(self.x_test, branches=branches).argmax(-1) == self.y_test).double().mean(dim=1)
        return dict(zip(self.ids, (100 * right).tolist(), strict=True))


def world(protocol: Protocol, seed: int, flipped: frozenset[str]) -> list[Group]:
    """Data and models; ``flipped`` clients train on wrong labels."""
    draw = torch.Generator().manual_seed(seed)
    rank, classes = protocol.rank, protocol.num_classes
    head = torch.randn(classes, rank, generator=draw)
    common = torch.randn(rank, rank, generator=draw)
    families = torch.randn(protocol.num_families, rank, rank, generator=draw)
    groups = []
    for number, width in enumerate(protocol.widths):
        ids = protocol.ids[number :: len(protocol.widths)]
        decode = torch.randn(width, rank, generator=draw)
        data: dict[str, list[Tensor]] = {name: [] for name in ("x", "y", "x_test", "y_test")}
        for client in ids:
            family = families[protocol.ids.index(client) // len(protocol.widths) % protocol.num_families]
            for suffix, count, noise in (("", protocol.train, protocol.label_noise), ("_test", protocol.test, 0.0)):
                z = torch.randn(count, rank, generator=draw)
                y = (z @ (protocol.shared * common + protocol.private * family).T @ head.T).argmax(-1)
                wrong = torch.rand(count, generator=draw) < noise
                y = torch.where(wrong, torch.randint(classes, (count,), generator=draw), y)
                data[f"x{suffix}"].append(z @ decode.T + 0.3 * torch.randn(count, width, generator=draw))
                data[f"y{suffix}"].append(classes - 1 - y if client in flipped and not suffix else y)
        shape = {"P": (rank, rank), "Q": (rank,), "A": (2, width), "B": (classes, 2)}
        start = {name: torch.zeros(len(ids), *dims) for name, dims in shape.items()}
        start["A"] = (torch.randn(2, width, generator=draw) / width).repeat(len(ids), 1, 1)
        local = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
        frozen = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        stacked = {name: torch.stack(tensors) for name, tensors in data.items()}
        optimizer = torch.optim.Adam(local.values(), lr=protocol.lr)
        groups.append(
            Group(
                ids, width, torch.linalg.pinv(decode), head, **stacked, local=local, frozen=frozen, optimizer=optimizer
            )
        )
    return groups


def upload(groups: Sequence[Group], round: int) -> list[Update]:
    """What honest clients send; the sketch is the gradient of P at the start of everything."""
    updates = []
    for group in groups:
        z = group.x @ group.encode.T
        residual = torch.nn.functional.one_hot(group.y, group.head.shape[0]).float() - 1 / group.head.shape[0]
        sketches = (residual @ group.head).transpose(1, 2) @ z / z.shape[1]
        for index, client in enumerate(group.ids):
            own = {name: tensor[index].detach().clone() for name, tensor in group.local.items()}
            shared = SharedTensors(
                FlatTensors.pack({"tower/0/q/P": own["P"], "tower/0/q/Q": own["Q"]}),
                FlatTensors.pack({"layers.0.q/A": own["A"], "layers.0.q/B": own["B"]}),
            )
            sketch = sketches[index].flatten()
            updates.append(Update(client, round, group.x.shape[1], f"width {group.width}", shared, sketch))
    return sorted(updates, key=lambda update: update.client_id)


def receive(groups: Sequence[Group], sent: Mapping, part: str) -> None:
    """Write what the server sent into the global branch (``frozen``) or over the client's own (``start``)."""
    for group in groups:
        target = group.frozen if part == "frozen" else group.local
        for index, client in enumerate(group.ids):
            personalized = getattr(sent[client], part) if client in sent else None
            if personalized is None:
                continue
            for name, tensor in {**personalized.common.unpack(), **personalized.same_architecture.unpack()}.items():
                target[name.rsplit("/", 1)[1]].data[index] = tensor


# -- attacks -----------------------------------------------------------------------------------------------------------


def changed(update: Update, change: Callable[[Tensor, str], Tensor], **fields) -> Update:
    """The same update with other numbers."""
    parts = {
        name: FlatTensors(flat.layout, change(flat.vector, name).clone())
        for name, flat in (("common", update.shared.common), ("same_architecture", update.shared.same_architecture))
    }
    return replace(update, shared=SharedTensors(**parts), **fields)


def means(honest: Sequence[Update]) -> Callable[[Update], Callable[[Tensor, str], Tensor]]:
    """The honest clients' mean, in the names that an update has."""

    def of(update: Update) -> Callable[[Tensor, str], Tensor]:
        group = [other for other in honest if other.architecture == update.architecture]
        found = {
            "common": torch.stack([other.shared.common.vector for other in honest]).mean(0),
            "same_architecture": torch.stack([other.shared.same_architecture.vector for other in group]).mean(0),
        }
        return lambda vector, part: found[part]

    return of


def behave(attackers: list[Update], honest: list[Update]) -> list[Update]:
    return attackers


def longer(factor: float) -> Attack:
    """What they learned, longer; backwards below zero."""
    return lambda attackers, honest: [changed(one, lambda vector, part: factor * vector) for one in attackers]


def collusion(attackers: list[Update], honest: list[Update]) -> list[Update]:
    """All send one and the same: the honest clients' mean, backwards, eight times as long as an honest update."""
    of = means(honest)

    def against(update: Update) -> Update:
        def change(vector: Tensor, part: str) -> Tensor:
            mean = of(update)(vector, part)
            alike = [getattr(other.shared, part).vector for other in honest]
            usual = torch.stack([flat.square().mean().sqrt() for flat in alike]).median()
            return -8 * usual * mean / mean.square().mean().sqrt().clamp(min=1e-12)

        return changed(update, change)

    return [against(update) for update in attackers]


def little(attackers: list[Update], honest: list[Update]) -> list[Update]:
    """All send the honest mean minus one and a half standard deviations of each number: inside the crowd (ALIE)."""
    result, of = [], means(honest)
    for one in attackers:
        group = [other for other in honest if other.architecture == one.architecture]
        spread = {
            "common": torch.stack([other.shared.common.vector for other in honest]).std(0),
            "same_architecture": torch.stack([other.shared.same_architecture.vector for other in group]).std(0),
        }
        mean = of(one)
        result.append(changed(one, lambda vector, part, m=mean, s=spread: m(vector, part) - 1.5 * s[part]))
    return result


def inflation(attackers: list[Update], honest: list[Update]) -> list[Update]:
    """Collusion, with the honest clients' mean sketch, so that everybody finds them relevant."""
    sketch = torch.stack([update.sketch for update in honest]).mean(0)
    return [replace(update, sketch=sketch.clone()) for update in collusion(attackers, honest)]


def twins(attackers: list[Update], honest: list[Update]) -> list[Update]:
    """Collusion, each with the very sketch of an honest client."""
    return [
        replace(update, sketch=honest[3 * index % len(honest)].sketch.clone())
        for index, update in enumerate(collusion(attackers, honest))
    ]


ATTACKS: dict[str, tuple[Attack, bool]] = {  # and whether they train on wrong labels
    "sign flip": (longer(-1.0), False),
    "sign flip x8": (longer(-8.0), False),
    "scaling x8": (longer(8.0), True),
    "scaling x1000": (longer(1000.0), True),
    "label flip": (behave, True),
    "collusion": (collusion, False),
    "within the crowd": (little, False),
    "relevance, mean": (inflation, False),
    "relevance, twin": (twins, False),
}


def robust(rule: RobustRule, f: int, *, for_all: bool = False) -> RobustAggregator:
    """A mixture beside each client's own adapter, or one model for all as in FedAvg."""
    return RobustAggregator(rule, num_attackers=f, global_branch=not for_all, warm_start=for_all)


PERSONAL: dict[str, Callable[[int], Aggregator]] = {
    "local only": lambda f: LocalOnly(),
    "uniform": lambda f: UniformAggregator(),
    "relevance": lambda f: RelevanceAggregator(),
    "`CoordinateMedian`": lambda f: robust(CoordinateMedian(), f),
    "`TrimmedMean`": lambda f: robust(TrimmedMean(), f),
    "`Krum(keep=1)`": lambda f: robust(Krum(keep=1), f),
    "`Krum`": lambda f: robust(Krum(), f),
    "`ClippedRelevance`": lambda f: robust(ClippedRelevance(), f),
}
FOR_ALL: dict[str, Callable[[int], Aggregator]] = {
    "FedAvg": lambda f: FedAvg(),
    "`CoordinateMedian`": lambda f: robust(CoordinateMedian(), f, for_all=True),
    "`TrimmedMean`": lambda f: robust(TrimmedMean(), f, for_all=True),
    "`Krum`": lambda f: robust(Krum(), f, for_all=True),
}
TABLES = {
    "Five families of tasks, a mixture beside each client's own adapter": (Protocol(), PERSONAL),
    "Nearly one task, one model for all": (Protocol(shared=0.9, private=0.3), FOR_ALL),
    "Nearly one task, one model for all, one architecture": (Protocol(shared=0.9, private=0.3, widths=(24,)), FOR_ALL),
}


def run(protocol: Protocol, aggregator: Aggregator, attack: Attack, *, wrong_labels: bool, seed: int) -> float:
    """Mean accuracy of the honest clients after the last round, in percent."""
    groups = world(protocol, seed, protocol.attackers if wrong_labels else frozenset())
    initial = {update.client_id: update for update in upload(groups, 0)}
    branches = aggregator.uses_global_branch
    state: Mapping = {}
    measures: Mapping = {}
    start = {client: update.shared for client, update in initial.items()}
    for round in range(protocol.rounds):
        for group in groups:
            group.fit(protocol.steps, branches=branches)
        updates = upload(groups, round)
        honest = [update for update in updates if update.client_id not in protocol.attackers]
        lying = attack([update for update in updates if update.client_id in protocol.attackers], honest)
        expected = {
            client: Expectation(
                architecture=update.architecture,
                layouts=(update.shared.common.layout, update.shared.same_architecture.layout),
                start=start[client],
            )
            for client, update in initial.items()
        }
        seen = aggregator.guard.inspect([*honest, *lying], expected=expected, measures=measures)
        measures = seen.measures
        result = aggregator.aggregate(seen.accepted, state)
        state = result.state
        for part in ("frozen", "start"):
            receive(groups, result.personalized, part)
        start |= {client: one.start for client, one in result.personalized.items() if one.start is not None}
    scores = {client: score for group in groups for client, score in group.accuracy(branches=branches).items()}
    kept = [score for client, score in scores.items() if client not in protocol.attackers]
    return sum(kept) / len(kept)


def table(
    protocol: Protocol, seeds: Sequence[int], rules: Mapping[str, Callable[[int], Aggregator]], attacks: Sequence[str]
) -> dict[str, dict[str, tuple[float, float]]]:
    """Per rule the accuracy without attacks, and per attack what it changes: mean and standard error over seeds."""
    result = {}
    for rule, make in rules.items():
        clean = [run(protocol, make(protocol.num_attackers), behave, wrong_labels=False, seed=seed) for seed in seeds]
        row = {"no attack": summary(clean)}
        for name in attacks:
            attack, wrong_labels = ATTACKS[name]
            attacked = [
                run(protocol, make(protocol.num_attackers), attack, wrong_labels=wrong_labels, seed=seed)
                for seed in seeds
            ]
            row[name] = summary([one - other for one, other in zip(attacked, clean, strict=True)])
        result[rule] = row
    return result


def summary(values: Sequence[float]) -> tuple[float, float]:
    numbers = torch.tensor(values, dtype=torch.float64)
    return float(numbers.mean()), float(numbers.std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for title, (protocol, rules) in TABLES.items():
        print(f"\n{title}\n\n| rule | no attack | " + " | ".join(ATTACKS) + " |")
        print("| --- |" + " --- |" * (1 + len(ATTACKS)))
        for rule, row in table(protocol, range(arguments.seeds), rules, list(ATTACKS)).items():
            cells = [f"{row['no attack'][0]:.1f}", *(f"{row[name][0]:+.1f} ± {row[name][1]:.1f}" for name in ATTACKS)]
            print(f"| {rule} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
