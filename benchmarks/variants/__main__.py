"""Which exchange pays, over seeds.

    python -m benchmarks.variants prepare [--sides val test]  states, sketches and alignments, once (20 minutes)
    python -m benchmarks.variants check                       these scores against the package's own layers
    python -m benchmarks.variants keys                        do questions find whoever trained on such ones?
    python -m benchmarks.variants tune OUT.jsonl              learning rates, on validation
    python -m benchmarks.variants run OUT.jsonl [--side val|test] [--seeds 0 1 ...] [--n 16 64] [--scenario static]
                                      [--alignment canonical] [--short]
    python -m benchmarks.variants table OUT.jsonl [...]       Markdown

Finished (scenario, alignment, side, n, seed) are not run again. A run is one process on one core; different seeds may
run beside each other into one file.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from .engine import OTHERS, run
from .materials import RULES, UNALIGNED, load, prepare
from .methods import SHORT, Method, variants
from .report import table
from .scenarios import dynamic, static
from .tuned import RATES

SCENARIOS = {"static": static, "dynamic": dynamic}
GRID = (5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 0.16, 0.32)
TUNED_ON = ("local", "no exchange", "no exchange, L + beta G", "restart from uniform (FedAvg)", "pull 0.3 to relatives")
TUNING_SEEDS = (100,)


def _done(out: Path) -> set[tuple[object, ...]]:
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return {(x["scenario"], x["alignment"], x["side"], x["n"], x["seed"], x["set"]) for x in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "check", "keys", "tune", "run", "table"))
    parser.add_argument("out", type=Path, nargs="*")
    parser.add_argument("--scenario", choices=list(SCENARIOS), default="static")
    parser.add_argument("--alignment", choices=[*RULES, UNALIGNED], default="canonical")
    parser.add_argument("--side", choices=("val", "test"), default="val")
    parser.add_argument("--sides", nargs="*", choices=("val", "test"), default=["val", "test"], help="to prepare")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--n", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--short", action="store_true", help="few methods")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "prepare":
        return prepare(options.sides)
    if options.what == "check":
        from .check import check

        return check()
    if options.what == "keys":
        from .keys import keys

        return keys()
    if options.what == "table":
        return print(table(options.out))
    [out] = options.out
    tune = options.what == "tune"
    name = "tune" if tune else "short" if options.short else "all"
    materials = None
    for seed in TUNING_SEEDS if tune else options.seeds:
        for n in options.n:
            key = (options.scenario, options.alignment, "val" if tune else options.side, n, seed, name)
            if key in _done(out):
                continue
            materials = materials or load(options.alignment, key[2])
            clients = SCENARIOS[options.scenario](seed)

            def methods(families: dict[str, list[str]], clients=clients, seed=seed, n=n) -> list[Method]:
                every = variants(clients, seed, families)
                if tune:
                    picked = [method for method in every if method.name in TUNED_ON]
                    return [replace(method, lr=lr) for method in picked for lr in GRID]
                kept = [method for method in every if not options.short or method.name in SHORT]
                return [replace(method, lr=RATES[n][method.structure]) for method in kept]

            rows = run(
                materials, clients, methods, num_train=n, seed=seed, side=key[2], num_others=0 if tune else OTHERS
            )
            label = {"scenario": options.scenario, "alignment": options.alignment, "set": name}
            with out.open("a") as file:
                file.write("".join(json.dumps(label | row) + "\n" for row in rows))
            print(f"{key}: {len(rows)} methods", flush=True)


if __name__ == "__main__":
    main()
