"""Measure whether P transfers between real models, by form of alignment: JSON lines.

    python -m benchmarks.alignment_transfer OUT.jsonl --pairs smollm2,gemma3 smollm2-15,smollm2 --forms canonical paper

A finished (models, form) is skipped. The first model of a pair is the anchor.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.alignment_transfer.bodies import Tail, scores
from benchmarks.alignment_transfer.public import each_word, last_word, records
from benchmarks.alignment_transfer.states import Examples, Model, load, words_of
from benchmarks.alignment_transfer.texts import make_plan
from lightning_pfl.adapters import CoLoraConfig, bases_of, inject, load_local, set_bases, shared_tensors
from lightning_pfl.adapters.alignment import Alignment, Canonical, CcaB, LeastSquares, align
from lightning_pfl.adapters.transfer import fit_pq

FORMS = {
    "unaligned": None,
    "paper": (LeastSquares(CcaB(), orthonormal_only=True), last_word),
    "least squares": (LeastSquares(), last_word),
    "least squares, every word": (LeastSquares(), each_word),
    "canonical": (Canonical(), last_word),
    "canonical, every word": (Canonical(), each_word),
    "canonical, every word, no weights": (Canonical(power=0), each_word),
}
RATES = (0.01, 0.04)


def main() -> None:
    """One line per (models, form)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", nargs="+", default=["smollm2,gemma3"])
    parser.add_argument("--forms", nargs="+", default=list(FORMS))
    parser.add_argument("--public", type=int, default=1200, help="texts that models read")
    parser.add_argument("--fit", type=int, default=1200, help="the first of them that alignments are fitted on")
    parser.add_argument("--tasks", nargs="+", default=None, help="all by default")
    parser.add_argument("--targets", nargs="+", default=None, help="names of adapted layers; all by default")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = {json.loads(line)["key"] for line in args.out.read_text().splitlines()} if args.out.exists() else set()
    plan = make_plan(args.public, seed=args.seed)
    for pair in args.pairs:
        setting = (pair, args.fit, args.blocks, args.steps, args.rank, args.seed, args.targets, args.tasks)
        keys = {form: f"{form}|{setting}" for form in args.forms}
        if not set(keys.values()) - done:
            continue
        models = {name: load(name, plan, args.blocks) for name in pair.split(",")}
        for name, model in models.items():
            config = CoLoraConfig(
                r=args.rank,
                alpha=2 * args.rank,
                num_blocks=args.blocks,
                blocks="layers",
                private_layers=False,
                base_identity=name,
                seed=args.seed,
                target_modules=args.targets,
            )
            inject(model.tail, config)
        own = {name: bases_of(model.tail) for name, model in models.items()}
        words = words_of(models)
        for form, key in keys.items():
            if key in done:
                continue
            start = time.process_time()
            report: list[dict[str, Any]] = []
            for name, model in models.items():
                set_bases(model.tail, own[name])
            if FORMS[form] is not None:
                rule, ask = FORMS[form]
                alignment = _aligned(models, words, plan.public[: args.fit], rule, ask)
                report = [asdict(fit) for fit in alignment.report]
                for model in models.values():
                    alignment.apply(model.tail)
            aligned = time.process_time()
            result = _transfers(models, args.tasks or list(plan.tasks), args.steps, args.seed)
            line = {
                "key": key,
                "models": list(models),
                "form": form,
                "settings": {**vars(args), "out": None},
                **result,
                "report": report,
                "cpu_s": {"align": round(aligned - start, 1), "transfer": round(time.process_time() - aligned, 1)},
            }
            with args.out.open("a") as sink:
                sink.write(json.dumps(line) + "\n")
            print(pair, form, {into: _told(rows) for into, rows in result["into"].items()}, line["cpu_s"], flush=True)


def _aligned(models: Mapping[str, Model], words: Mapping[str, Tensor], public: Sequence[str], rule, ask) -> Alignment:
    anchor = next(iter(models))
    tails = {name: model.tail for name, model in models.items()}
    states = {name: model.public for name, model in models.items()}
    return align(tails, list(records(states, words, public, ask)), anchor=anchor, rule=rule, loss=_prefers)


def _prefers(tail: Tail, inputs: Mapping[str, Any]) -> Tensor:
    """By how much one word is preferred to another, summed over the places that are asked about."""
    at = inputs["at"]
    states = tail(inputs["hidden"])[at[:, 0], at[:, 1]]
    score = torch.einsum("rd,rwd->rw", states, tail.head[inputs["words"]].float())
    return (score[:, 0] - score[:, 1]).sum()


def _transfers(models: Mapping[str, Model], titles: Sequence[str], steps: int, seed: int) -> dict[str, Any]:
    """Every model's P in every other, task by task: (loss, accuracy) of zero, own and transferred."""
    found, rates = {}, {}
    for name, model in models.items():
        for title in titles:
            prior = _prior(model, title)
            best = None
            for lr in RATES:
                _zero(model.tail)
                fit_pq(model.tail, _batches(model.examples[title, "train"], steps, seed, prior), loss=_loss, lr=lr)
                loss, _ = _measured(model, title, "validation", prior)
                if best is None or loss < best[0]:
                    best = (loss, lr, shared_tensors(model.tail))
            found[name, title], rates[f"{name}|{title}"] = best[2], best[1]
    into: dict[str, Any] = {}
    for name, model in models.items():
        for title in titles:
            prior = _prior(model, title)
            _zero(model.tail)
            row = {"task": title, "zero": _measured(model, title, "test", prior)}
            for other in models:
                load_local(model.tail, found[other, title])
                row["own" if other == name else other] = _measured(model, title, "test", prior)
            into.setdefault(name, []).append(row)
        _zero(model.tail)
    return {"into": into, "rates": rates}


def _zero(tail: Tail) -> None:
    with torch.no_grad():
        for name, parameter in tail.named_parameters():
            if "colora_P" in name or "colora_Q" in name:
                parameter.zero_()


def _batch(examples: Examples, chosen: Any, prior: Tensor) -> dict[str, Any]:
    last = examples.states.lengths[chosen] - 1
    return {
        "hidden": examples.states.hidden[chosen][:, : int(last.max()) + 1],
        "positions": last,
        "words": examples.words.expand(len(last), -1),
        "labels": examples.labels[chosen],
        "prior": prior,
    }


def _batches(examples: Examples, steps: int, seed: int, prior: Tensor, size: int = 12):
    """The same examples in the same order for every model."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield _batch(examples, torch.randperm(len(examples.labels), generator=generator)[:size], prior)


@torch.no_grad()
def _prior(model: Model, title: str) -> Tensor:
    """Which answers a model prefers whatever it reads: its mean scores over the training texts, without labels."""
    _zero(model.tail)
    return scores(model.tail, _batch(model.examples[title, "train"], slice(None), torch.zeros(()))).mean(0)


def _loss(tail: Tail, batch: Mapping[str, Any]) -> Tensor:
    return cross_entropy(scores(tail, batch) - batch["prior"], batch["labels"])


@torch.no_grad()
def _measured(model: Model, title: str, part: str, prior: Tensor) -> tuple[float, float]:
    batch = _batch(model.examples[title, part], slice(None), prior)
    found = scores(model.tail, batch) - prior
    return (
        round(float(cross_entropy(found, batch["labels"])), 4),
        round(float((found.argmax(1) == batch["labels"]).float().mean()), 4),
    )


def _told(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [key for key in rows[0] if key != "task"]
    means = {name: torch.tensor([row[name] for row in rows]).mean(0).tolist() for name in names}
    recovered = {
        name: (means["zero"][0] - means[name][0]) / (means["zero"][0] - means["own"][0])
        for name in names
        if name not in ("zero", "own")
    }
    return (
        " ".join(f"{name} {loss:.3f}/{right:.3f}" for name, (loss, right) in means.items()) + f" recovered {recovered}"
    )


if __name__ == "__main__":
    main()
