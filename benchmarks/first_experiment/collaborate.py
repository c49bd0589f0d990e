"""(ii) Collaboration at equal steps: one JSON line per (method, scenario, samples, seed)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .bodies import Factors, Maps
from .engine import AdamW, Arch, batches, evaluate, ramp, scores, zeros
from .scenario import CLIENTS, ROUNDS, Scenario
from .sketches import Projection, cosines, per_example, weights
from .suite import Task

OTHERS = 16  # test samples per task of somebody else
OWN = 120


@dataclass(frozen=True)
class Method:
    """``use``: plain (L alone), mix (beta G + (1 - beta) L, the paper's), add (L + beta G).

    ``rows``: policy of G's row ("" leaves G = 0). ``warm``: policy of the mixture that L restarts from ("" keeps L).
    ``pull``: share of that mixture taken at a warm start. ``beta``: start of the gate. ``lr``: learning rate.
    """

    name: str
    use: str = "plain"
    rows: str = ""
    warm: str = ""
    pull: float = 1.0
    beta: float = 0.5
    lr: float = 1e-2
    lr_gate: float = 1e-2
    until: int = ROUNDS  # warm starts happen in the first so many rounds
    own: bool = False  # "no exchange": G is the client's own last upload
    after: bool = False  # evaluated after the last mixture instead of before it


def effective(m: list[Method], L: Tensor, G: Tensor, gate: Tensor) -> Tensor:
    """Map in use: L, G [M, C, J, ...], gate [M, C, J]."""
    b = torch.sigmoid(gate).view(*gate.shape, *[1] * (L.dim() - 3))
    shape = [len(m)] + [1] * (L.dim() - 1)
    cl = torch.tensor([1.0 if x.use != "mix" else 0.0 for x in m]).view(shape)
    cg = torch.tensor([0.0 if x.use == "plain" else 1.0 for x in m]).view(shape)
    return (cl + (1 - cl) * (1 - b)) * L + cg * b * G


def logit(x: float) -> float:
    """Inverse of the sigmoid."""
    return float(torch.logit(torch.tensor(x)))


def run(
    archs: list[Arch],
    factors: list[Factors],
    proxy: Arch,
    sc: Scenario,
    tasks: dict[str, Task],
    methods: list[Method],
    n: int,
    seed: int,
    steps: int = 8,
    batch: int = 8,
    side: str = "test",
) -> list[dict[str, object]]:
    """All methods side by side on the same batches; the result rows, one per method."""
    M, half = len(methods), CLIENTS // len(archs)
    P, Q = zeros(archs[0], M, CLIENTS)
    gate = torch.stack([torch.full((CLIENTS, P.shape[2]), logit(m.beta)) for m in methods])
    GP, GQ = torch.zeros_like(P), torch.zeros_like(Q)
    lr = torch.tensor([m.lr for m in methods])
    params = [
        [x[:, k * half : (k + 1) * half].clone().requires_grad_(True) for x in (P, Q, gate)] for k in range(len(archs))
    ]
    opts = [(AdamW(p[:2], lr), AdamW(p[2:], torch.tensor([m.lr_gate for m in methods]))) for p in params]
    offset = (seed * 64) % 256
    sketch: Tensor | None = None
    parts = {}
    project = Projection(proxy.body.width, proxy.body.layers[0]["down"].shape[1])
    cos_log = []
    for r in range(ROUNDS):
        now = [tasks[sc.at(c, r)] for c in range(CLIENTS)]
        order = [batches(n, batch, steps, 10_000 * seed + 100 * r + c) + offset for c in range(CLIENTS)]
        for k, arch in enumerate(archs):
            cl = range(k * half, (k + 1) * half)
            mask = torch.stack([arch.masks[now[c].name] for c in cl]).repeat(M, 1, 1)
            rows = torch.stack([arch.rows[now[c].name] for c in cl]).repeat(M, 1)
            prior = torch.stack([arch.prior[now[c].name] for c in cl]).repeat(M, 1)
            for s in range(steps):
                h = torch.stack([arch.states[now[c].name]["train"][order[c][s]] for c in cl]).repeat(M, 1, 1, 1)
                y = torch.stack([now[c].y["train"][order[c][s]] for c in cl]).repeat(M, 1)
                p, q, g = params[k]
                use = Maps(
                    effective(methods, p, GP[:, list(cl)], g).flatten(0, 1),
                    effective(methods, q, GQ[:, list(cl)], g).flatten(0, 1),
                )
                z = scores(arch, h, mask, rows, prior, factors[k], use)
                loss = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(len(y), -1).mean(1).sum()
                grads = torch.autograd.grad(loss, [p, q, g])
                f = ramp(r * steps + s, ROUNDS * steps)
                opts[k][0].step(list(grads[:2]), f)
                opts[k][1].step([grads[2]], f)
        P, Q = (torch.cat([x[i].detach() for x in params], 1) for i in (0, 1))
        fresh = []
        for c in range(CLIENTS):
            t = now[c]
            if t.name not in parts:
                parts[t.name] = per_example(proxy, t, 320)
            used = torch.unique(order[c])
            fresh.append(project(parts[t.name][0][used], parts[t.name][1][used]))
        sketch = torch.stack(fresh) if sketch is None else 0.5 * sketch + 0.5 * torch.stack(fresh)
        cos, oracle = cosines(sketch), sc.oracle(r)
        cos_log.append(
            float(
                torch.corrcoef(
                    torch.stack([cos[~torch.eye(8, dtype=torch.bool)], oracle[~torch.eye(8, dtype=torch.bool)]])
                )[0, 1]
            )
        )
        last = r == ROUNDS - 1
        for i, m in enumerate(methods):
            if m.rows and not last:
                w = weights(cos, m.rows, oracle, include_self=False)
                GP[i], GQ[i] = (torch.einsum("ij,j...->i...", w, x[i]) for x in (P, Q))
            elif m.own and not last:
                GP[i], GQ[i] = P[i], Q[i]
            if m.warm and r < m.until and (not last or m.after):
                w = weights(cos, m.warm, oracle, include_self=True)
                with torch.no_grad():
                    for x, k in ((P, 0), (Q, 1)):
                        new = torch.lerp(x[i], torch.einsum("ij,j...->i...", w, x[i]), m.pull)
                        for a in range(len(archs)):
                            params[a][k][i] = new[a * half : (a + 1) * half]
    return report(archs, factors, sc, tasks, methods, params, (GP, GQ), n, seed, cos_log, side)


def report(archs, factors, sc, tasks, methods, params, G, n, seed, cos_log, side) -> list[dict[str, object]]:
    """Every client on its own tasks, the others' and the novel ones (``side`` "val" for tuning)."""
    own = OWN if side == "test" else 64
    M, half, table = len(methods), CLIENTS // len(archs), [[{} for _ in range(CLIENTS)] for _ in methods]
    plans = [
        [(t, own) for t in sc.tasks[c]] + [(t, OTHERS) for t in [*sc.others(c), *sc.novel]] for c in range(CLIENTS)
    ]
    for k, arch in enumerate(archs):
        cl = list(range(k * half, (k + 1) * half))
        p, q, g = (x.detach() for x in params[k])
        use = Maps(
            effective(methods, p, G[0][:, cl], g).flatten(0, 1), effective(methods, q, G[1][:, cl], g).flatten(0, 1)
        )
        for slot in range(max(len(plans[c]) for c in cl)):
            item = [plans[c][slot] for c in cl]
            res = evaluate(arch, [tasks[t] for t, _ in item] * M, side, item[0][1], factors[k], use).view(M, half, 2)
            for i in range(M):
                for j, c in enumerate(cl):
                    table[i][c][item[j][0]] = [round(float(v), 4) for v in res[i, j]]
    out = []
    for i, m in enumerate(methods):
        groups: dict[str, list[list[float]]] = {"self": [], "seen": [], "unseen": [], "novel": []}
        for c in range(CLIENTS):
            fams = {t.partition("/")[0] for t in sc.tasks[c]}
            for t, v in table[i][c].items():
                kind = (
                    "self"
                    if t in sc.tasks[c]
                    else "novel"
                    if t in sc.novel
                    else "seen"
                    if t.partition("/")[0] in fams
                    else "unseen"
                )
                groups[kind].append(v)
        row: dict[str, object] = {
            "method": m.name,
            "scenario": sc.name,
            "n": n,
            "seed": seed,
            "lr": m.lr,
            "corr": [round(x, 2) for x in cos_log],
        }
        for kind, v in groups.items():
            t = torch.tensor(v)
            row[kind], row[f"{kind}_lik"] = round(100 * float(t[:, 0].mean()), 2), round(float(t[:, 1].mean()), 4)
        oth = torch.tensor(groups["seen"] + groups["unseen"])
        row["others"], row["others_lik"] = round(100 * float(oth[:, 0].mean()), 2), round(float(oth[:, 1].mean()), 4)
        row["gate"] = round(float(torch.cat([torch.sigmoid(x[2].detach())[i].flatten() for x in params]).mean()), 3)
        row["by_client"] = [[v for t, v in table[i][c].items() if t in sc.tasks[c]] for c in range(CLIENTS)]
        out.append(row)
    return out
