"""(i) Transfer: train P, Q on one model for a task, load them into the other; every form of alignment, both
directions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from .bodies import Factors, Maps
from .engine import Arch, evaluate, fit, load_arch, zeros
from .forms import make, quality, shrunk
from .joint import joint
from .moments import Moments, collect
from .suite import CHOSEN, load_public, load_tasks

FORMS = ("unaligned", "orthonormal+cca", "lsq+cca", "lsq+gradient", "lsq+gradient-matched", "canonical")
LRS = (5e-3, 2e-2)


HELD = 160  # public pictures kept for measuring an alignment


def banned_words(cache: Path) -> set[str]:
    """Answers of the real tasks: never used on public data."""
    return {w for t in load_tasks(cache).values() for w in t.answers}


def moments_of(a: Arch, b: Arch, cache: Path, held: bool = False) -> tuple[Moments, Moments]:
    """Paired moments, cached; ``held``: over the held-out public pictures (and other word pairs)."""
    f = (
        cache
        / f"moments_{a.name}{a.body.depth}_{b.name}{b.body.depth}_{len(a.body.targets)}{'_held' if held else ''}.pt"
    )
    if not f.exists():
        pictures = range(HELD) if held else range(HELD, HELD + 1280)
        m, o = collect(
            a.body, a.projector, b.body, b.projector, load_public(cache), banned_words(cache), pictures, seed=int(held)
        )
        torch.save([(x.aa, x.bb, x.ab, x.ma, x.mb) for x in (m, o)], f)
    return tuple(Moments(*x) for x in torch.load(f))  # type: ignore[return-value]


def factors_of(form: str, a: Arch, b: Arch, cache: Path, seed: int = 0) -> tuple[Factors, Factors]:
    """The frozen factors of a form, cached; ``joint:BASE:options`` starts from a closed form."""
    name = form.replace(":", "_").replace("/", "_")
    f = cache / f"factors_{name}_{a.body.depth}_{b.body.depth}_{len(a.body.targets)}_{seed}.pt"
    if not f.exists():
        m, o = moments_of(a, b, cache)
        if form.startswith("joint"):
            _, base, *opts = form.split(":")
            kw = {
                k: (v == "True" if v in ("True", "False") else float(v) if "." in v or "e" in v else int(v))
                for k, v in (x.split("=") for x in opts)
            }
            fa, fb = joint(
                a, b, *factors_of(base, a, b, cache, seed), load_public(cache), banned_words(cache), seed=seed, **kw
            )
        elif "~" in form:  # "FORM~POWER": shrunk by held-out correlations
            base, power = form.split("~")
            fa, fb = shrunk(
                *factors_of(base, a, b, cache, seed), *moments_of(a, b, cache, held=True), power=float(power)
            )
        else:
            fa, fb = make(form, m, o, seed)
        torch.save([(x.A, x.B, x.c, x.scale) for x in (fa, fb)], f)
    return tuple(Factors(*x) for x in torch.load(f))  # type: ignore[return-value]


def main() -> None:
    """One JSON line per (form, seed)."""
    p = argparse.ArgumentParser()
    p.add_argument("raw", type=Path)
    p.add_argument("cache", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--forms", nargs="*", default=FORMS)
    p.add_argument("--n", type=int, default=64)
    p.add_argument("--steps", type=int, default=80)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--depths", type=int, nargs=2, default=(12, 8))
    p.add_argument("--blocks", type=int, default=2)
    p.add_argument("--compile", action="store_true")
    v = p.parse_args()
    torch.set_num_threads(1)
    tasks = load_tasks(v.cache)
    archs = [
        load_arch(v.raw, v.cache, n, d, tasks, v.blocks) for n, d in zip(("smollm2", "gemma3"), v.depths, strict=True)
    ]
    if v.compile:
        for x in archs:
            x.score = torch.compile(x.body.logits, dynamic=False)
    pick = [tasks[f"{f}/{d[(v.seed + k) % 4]}"] for f, d in CHOSEN.items() for k in (0, 1)]
    many = [t for t in pick for _ in LRS]
    lr = torch.tensor([x for _ in pick for x in LRS])
    done = {json.loads(r)["key"] for r in v.out.read_text().splitlines()} if v.out.exists() else set()
    for form in v.forms:
        key = f"{form}|{v.n}|{v.steps}|{v.seed}|{v.blocks}"
        if key in done:
            continue
        fs = factors_of(form, archs[0], archs[1], v.cache, v.seed)
        m, o = moments_of(archs[0], archs[1], v.cache, held=True)
        row = {
            "key": key,
            "form": form,
            "n": v.n,
            "steps": v.steps,
            "seed": v.seed,
            "blocks": v.blocks,
            "corr": quality(*fs, m, o),
            "tasks": [t.name for t in pick],
        }
        best = []
        for arch, f in zip(archs, fs, strict=True):
            maps = fit(arch, many, v.n, v.steps, f, lr, 1000 + v.seed)
            val = evaluate(arch, many, "val", 80, f, maps)[:, 1].view(len(pick), len(LRS)).mean(0)
            k = int(val.argmax())
            best.append(Maps(maps.P[k :: len(LRS)], maps.Q[k :: len(LRS)]))
            row[f"lr_{arch.name}"] = LRS[k]
        for i, (arch, f) in enumerate(zip(archs, fs, strict=True)):
            # each call sees len(many) runs, so that a compiled body keeps its shape
            both = Maps(torch.cat([best[i].P, best[1 - i].P]), torch.cat([best[i].Q, best[1 - i].Q]))
            res = evaluate(arch, pick + pick, "test", 80, f, both)
            zero = evaluate(arch, pick + pick, "test", 80, f, Maps(*zeros(arch, len(pick) * 2)))[: len(pick)]
            own, got = res[: len(pick)], res[len(pick) :]
            for name, x in (("own", own), ("got", got), ("zero", zero)):
                row[f"{arch.name}_{name}"] = [[round(float(q), 4) for q in r] for r in x]
            z, w, g = zero.mean(0), own.mean(0), got.mean(0)
            row[f"{arch.name}_recovered"] = [round(float(q), 3) for q in (g - z) / (w - z)]
            print(f"{form:24s} into {arch.name}: acc zero {z[0]:.3f} own {w[0]:.3f} got {g[0]:.3f}", flush=True)
            print(f"  loss {-z[1]:.3f} {-w[1]:.3f} {-g[1]:.3f}, recovered {row[f'{arch.name}_recovered']}", flush=True)
        print("  corr z, grad", row["corr"], flush=True)
        with v.out.open("a") as h:
            h.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
