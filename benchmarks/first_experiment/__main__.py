"""The collaboration grid: ``python -m benchmarks.first_experiment RAW CACHE OUT --set coarse --align FORM ...``."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from .collaborate import run
from .engine import load_arch
from .grids import GRIDS
from .scenario import scenario
from .suite import load_tasks
from .transfer import factors_of

SHOWN = ("self", "others", "seen", "unseen", "novel", "self_lik", "others_lik", "gate")


def main() -> None:
    """Finished (method, align, scenario, n, seed) are skipped, so a stopped job goes on."""
    p = argparse.ArgumentParser()
    p.add_argument("raw", type=Path)
    p.add_argument("cache", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--set", default="coarse")
    p.add_argument("--align", default="lsq+gradient")
    p.add_argument("--scenarios", nargs="*", default=("static", "dynamic"))
    p.add_argument("--n", type=int, nargs="*", default=(16, 64))
    p.add_argument("--seeds", type=int, nargs="*", default=(0,))
    p.add_argument("--depths", type=int, nargs=2, default=(12, 8))
    p.add_argument("--methods", type=int, default=4, help="methods side by side")
    p.add_argument("--side", default="test", choices=("test", "val"))
    p.add_argument("--blocks", type=int, default=2)
    p.add_argument("--lr", type=float, help="learning rate of every method, instead of the grid's")
    p.add_argument("--eager", action="store_true")
    v = p.parse_args()
    torch.set_num_threads(1)
    tasks = load_tasks(v.cache)
    archs = [
        load_arch(v.raw, v.cache, n, d, tasks, v.blocks) for n, d in zip(("smollm2", "gemma3"), v.depths, strict=True)
    ]
    factors = list(factors_of(v.align, archs[0], archs[1], v.cache))
    if not v.eager:
        for x in archs:
            x.score = torch.compile(x.body.logits, dynamic=False)
    for seed in v.seeds:
        for n in v.n:
            for s in v.scenarios:
                key = lambda r: (r["method"], r["align"], r["scenario"], r["n"], r["seed"])  # noqa: E731
                done = {key(json.loads(r)) for r in v.out.read_text().splitlines()} if v.out.exists() else set()
                methods = [replace(m, lr=v.lr or m.lr) for m in GRIDS[v.set](n)]
                todo = [m for m in methods if (m.name, v.align, s, n, seed) not in done]
                for i in range(0, len(todo), v.methods):
                    part = todo[i : i + v.methods]
                    full = part + part[-1:] * (v.methods - len(part))  # a compiled body keeps its shape
                    rows = run(archs, factors, archs[0], scenario(s, seed), tasks, full, n, seed, side=v.side)[
                        : len(part)
                    ]
                    with v.out.open("a") as h:
                        for r in rows:
                            h.write(
                                json.dumps(
                                    r | {"align": v.align, "depths": list(v.depths), "side": v.side, "blocks": v.blocks}
                                )
                                + "\n"
                            )
                            print(r["scenario"], r["n"], r["seed"], r["method"], {k: r[k] for k in SHOWN}, flush=True)


if __name__ == "__main__":
    main()
