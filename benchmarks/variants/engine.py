"""Train all methods on the same batches, client by client, and score every client on everybody's tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_pfl.functional.relevance import Peers
from lightning_pfl.functional.similarity import Cosine

from .block import ROLES, Block, Prefix
from .materials import ANCHOR, Materials
from .methods import Method
from .scenarios import ClientTasks, families_by, family_of

ROUNDS, STEPS, BATCH = 8, 8, 8
OTHERS = 12
"""Examples of each task that is somebody else's."""


class AdamW:
    """AdamW without decay over stacked methods, a learning rate each."""

    def __init__(self, parameters: Sequence[Tensor], lr: Tensor) -> None:
        self.parameters, self._lr, self._steps = parameters, lr, 0
        self._first = [torch.zeros_like(one) for one in parameters]
        self._second = [torch.zeros_like(one) for one in parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        self._steps += 1
        for parameter, gradient, first, second in zip(
            self.parameters, gradients, self._first, self._second, strict=True
        ):
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.001)
            size = (second / (1 - 0.999**self._steps)).sqrt_().add_(1e-8)
            rate = self._lr.view(-1, *[1] * (parameter.dim() - 1)) / (1 - 0.9**self._steps)
            parameter.sub_(rate * first / size)


@dataclass(eq=False)
class State:
    """One client under all m methods: what it trains, and the mixture it was given."""

    P: Tensor
    Q: Tensor
    gate: Tensor
    G_P: Tensor
    G_Q: Tensor
    optimizers: tuple[AdamW, AdamW]

    @staticmethod
    def fresh(methods: Sequence[Method], rank: int) -> State:
        m, linears = len(methods), len(ROLES)
        P, Q, gate = torch.zeros(m, linears, rank, rank), torch.zeros(m, linears, rank), torch.zeros(m, linears)
        for tensor in (P, Q, gate):
            tensor.requires_grad_(True)
        lr, lr_gate = (torch.tensor([getattr(one, name) for one in methods]) for name in ("lr", "lr_gate"))
        optimizers = AdamW([P, Q], lr), AdamW([gate], lr_gate)
        return State(P, Q, gate, torch.zeros(P.shape), torch.zeros(Q.shape), optimizers)

    def used(self, methods: Sequence[Method]) -> tuple[Tensor, Tensor]:
        """What the layer applies: L, beta G + (1 - beta) L, or L + beta G, method by method."""
        beta = torch.sigmoid(self.gate)
        weights = [
            (torch.zeros(len(ROLES)), torch.ones(len(ROLES))) if one.combine is None else one.combine.weights(beta[i])
            for i, one in enumerate(methods)
        ]
        g, l = (torch.stack(part) for part in zip(*weights, strict=True))  # noqa: E741
        return (
            g[..., None, None] * self.G_P + l[..., None, None] * self.P,
            g[..., None] * self.G_Q + l[..., None] * self.Q,
        )


def run(
    materials: Materials,
    clients: Sequence[ClientTasks],
    methods_of: Callable[[dict[str, list[str]]], list[Method]],
    *,
    num_train: int,
    seed: int,
    side: str,
    rounds: int = ROUNDS,
    num_others: int = OTHERS,
) -> list[dict[str, Any]]:
    """One row per method.

    Args:
        materials: blocks and tasks.
        clients: who trains on what.
        methods_of: the methods, given the family of every client in a round; their number and order stay.
        num_train: examples per task.
        seed: which examples, and their order; it is the same for all methods.
        side: of the split that is scored.
        rounds: of `STEPS` steps each.
        num_others: examples of each task that is somebody else's; 0: own tasks only.
    """
    rank = next(iter(materials.blocks.values())).rank
    states = {client.id: State.fresh(methods_of(families_by(clients, 0, rounds)), rank) for client in clients}
    memory: dict[str, Tensor] = {}
    for round_ in range(rounds):
        methods = methods_of(families_by(clients, round_, rounds))
        for index, client in enumerate(clients):
            task = client.at(round_, rounds)
            train = materials.tasks[client.model][task]["train"]
            chosen = _chosen(len(train), num_train, seed)
            order = _order(len(chosen), 1000 * seed + 100 * round_ + index)
            _train(materials.blocks[client.model], train, chosen[order], states[client.id], methods)
            sketch = materials.sketches[task][chosen].mean(0)
            memory[client.id] = 0.5 * memory[client.id] + 0.5 * sketch if client.id in memory else sketch
        if round_ == rounds - 1:
            before = _scores(materials, clients, states, methods, side, num_others=0)
        _exchange(clients, states, methods, memory)
    after = _scores(materials, clients, states, methods, side, num_others=num_others)
    return [
        {
            "method": method.name, "n": num_train, "seed": seed, "side": side, "lr": method.lr,
            **{f"{name}": round(float(value), 4) for name, value in after[index].items()},
            **{f"{name}_before": round(float(value), 4) for name, value in before[index].items()},
            "gate": _opening([state.gate[index] for state in states.values()]),
        }
        for index, method in enumerate(methods)
    ]  # fmt: skip


def _train(block: Block, train: Prefix, order: Tensor, state: State, methods: Sequence[Method]) -> None:
    """`STEPS` steps of all methods on the same batches."""
    pull = torch.tensor([method.pull for method in methods])
    for rows in order.view(-1, BATCH)[:STEPS]:
        batch = train.take(rows)
        logits = block.logits(batch, *state.used(methods))
        losses = F.cross_entropy(logits.flatten(0, 1), batch.answer.repeat(len(methods)), reduction="none").view(
            len(methods), -1
        )
        loss = losses.mean(1).sum()
        if bool(pull.any()):
            away = (state.P - state.G_P).square().sum((1, 2, 3)) + (state.Q - state.G_Q).square().sum((1, 2))
            loss = loss + (pull * away).sum()
        gradients = torch.autograd.grad(loss, [state.P, state.Q, state.gate], materialize_grads=True)
        state.optimizers[0].step(gradients[:2])
        state.optimizers[1].step(gradients[2:])


@torch.no_grad()
def _exchange(
    clients: Sequence[ClientTasks], states: dict[str, State], methods: Sequence[Method], memory: dict[str, Tensor]
) -> None:
    """Give every client its mixture and, where a method says so, a new start."""
    ids = [client.id for client in clients]
    peers = Peers.fresh(ids, similarity=Cosine().matrix(torch.stack([memory[client] for client in ids])))
    P = torch.stack([states[client].P for client in ids])  # [N, m, 7, r, r]
    Q = torch.stack([states[client].Q for client in ids])
    for index, method in enumerate(methods):
        uploads = P[:, index], Q[:, index]
        for rows_of, start in ((method.mixture, False), (method.restart, True)):
            if rows_of is None:
                continue
            rows = rows_of.rows(peers, uploads[0])
            letters = "lij,jl...->il..." if rows.dim() == 3 else "ij,j...->i..."
            mixed = [torch.einsum(letters, rows, upload) for upload in uploads]
            for client, new_P, new_Q in zip(ids, *mixed, strict=True):
                state = states[client]
                targets = (state.P, state.Q) if start else (state.G_P, state.G_Q)
                for target, new in zip(targets, (new_P, new_Q), strict=True):
                    target[index] = new if start else torch.lerp(new, target[index], method.ema)


@torch.no_grad()
def _scores(
    materials: Materials,
    clients: Sequence[ClientTasks],
    states: dict[str, State],
    methods: Sequence[Method],
    side: str,
    *,
    num_others: int,
) -> list[dict[str, Tensor]]:
    """Per method: accuracy in percent and likelihood in nats, on own tasks (Self) and on others', relatives apart."""
    found: dict[str, list[Tensor]] = {"self": [], "related": [], "unrelated": []}
    everything = sorted({task for client in clients for task in client.tasks})
    for client in clients:
        block, used = materials.blocks[client.model], states[client.id].used(methods)
        own = {family_of(task) for task in client.tasks}
        for task in everything:
            if not num_others and task not in client.tasks:
                continue
            kind = "self" if task in client.tasks else "related" if family_of(task) in own else "unrelated"
            examples = materials.tasks[client.model][task][side]
            if kind != "self":
                examples = examples.take(slice(0, num_others))
            found[kind].append(_measured(block, examples, used))
    out = []
    for index in range(len(methods)):
        row = {}
        for kind, pairs in (*found.items(), ("others", found["related"] + found["unrelated"])):
            if not pairs:
                continue
            mean = torch.stack([pair[index] for pair in pairs]).mean(0)
            row[kind], row[f"{kind}_lik"] = 100 * mean[0], mean[1]
        out.append(row)
    return out


def _measured(block: Block, examples: Prefix, used: tuple[Tensor, Tensor]) -> Tensor:
    """``[m, 2]``: accuracy and mean log-likelihood of the right answer."""
    parts = []
    for start in range(0, len(examples), 25):
        batch = examples.take(slice(start, start + 25))
        said = block.logits(batch, *used).log_softmax(-1)
        right = said.gather(-1, batch.answer.expand(len(said), -1)[..., None])[..., 0]
        parts.append(torch.stack([(said.argmax(-1) == batch.answer).float(), right]))
    return torch.cat(parts, dim=2).mean(2).T


def _opening(gates: Sequence[Tensor]) -> float:
    return round(float(torch.sigmoid(torch.stack([gate.detach() for gate in gates])).mean()), 3)


def _chosen(available: int, num: int, seed: int) -> Tensor:
    """A run of examples; tasks are ordered so that any run is nearly balanced."""
    num = min(num, available)
    return torch.arange(num) + (seed * num) % (available - num + 1)


def _order(available: int, seed: int) -> Tensor:
    """Enough shuffled passes for a round."""
    generator = torch.Generator().manual_seed(seed)
    passes = -(-STEPS * BATCH // available)
    return torch.cat([torch.randperm(available, generator=generator) for _ in range(passes)])[: STEPS * BATCH]


__all__ = ["ANCHOR", "run"]
