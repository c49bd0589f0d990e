"""Measure every task of the suite: chance, a linear probe, and what the probe gains from the data of relatives.

    python benchmarks/suite_headroom.py [TASK ...] [--sizes 16 64 320] [--seeds 3] [--write TABLE.md]

The probe is a ridge regression on the frozen features of EfficientNet-Lite0, the same for every task, with a few
readings of an example among which the task's validation split chooses, as it does the ridge:

    whole    the pictures' tokens one after another, then one-hot answers
    change   differences of each picture's tokens to the next one's, and their absolute values
    spread   mean and standard deviation of the tokens over the pictures, and the last one against the others
    select   one score per picture (is it the one?), the highest wins; where the answers name places

Questions whose text varies enter as a product: the kernel of two examples is multiplied by one plus one if they ask in
the same words. Answers are restricted to what an example offers.

With relatives (the strong links of the task graph that are trained on; the weak ones where there is none), the probe
also gets the scores that each relative's own probe, trained on n of its examples, gives to the pictures, one by one
and on the mean; and, where a relative offers the same answers for as many pictures, its examples are added. Validation
chooses between these and going without. Results are kept line by line, so the script goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

from lightning_pfl.benchmark.features import EfficientNetTokens, FeatureStore
from lightning_pfl.benchmark.suite.catalogue import TASKS, find_task, find_tasks
from lightning_pfl.benchmark.suite.graph import relatives
from lightning_pfl.benchmark.suite.library import load_library
from lightning_pfl.benchmark.suite.recipes import SUITE, Sizes, TaskSpec, build_task, chance
from lightning_pfl.benchmark.tasks import Example, Task

RIDGES = (0.003, 0.03, 0.3, 3.0)
PLACES = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class Side:
    """Tokens [n, images, 5, width] with what was asked, offered and right."""

    tokens: Tensor
    questions: tuple[str, ...]
    offered: tuple[tuple[str, ...], ...]
    answers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.answers)


def load(examples: Sequence[Example], store: FeatureStore) -> Side:
    count = len(examples[0].images)
    flat = store.tokens([view for example in examples for view in example.images]).float()
    return Side(
        flat.view(len(examples), count, *flat.shape[1:]),
        tuple(example.question for example in examples),
        tuple(example.choices for example in examples),
        tuple(example.answer for example in examples),
    )


def whole(side: Side) -> Tensor:
    return side.tokens.flatten(1)


def change(side: Side) -> Tensor:
    steps = (side.tokens[:, 1:] - side.tokens[:, :-1]).flatten(1)
    return torch.cat([steps, steps.abs()], dim=1)


def spread(side: Side) -> Tensor:
    tokens = side.tokens[:, :, 0]
    last = (tokens[:, -1] - tokens[:, :-1].mean(1)).abs()
    return torch.cat([tokens.mean(1), tokens.std(1), last], dim=1)


def readings(side: Side) -> dict[str, Callable[[Side], Tensor]]:
    found: dict[str, Callable[[Side], Tensor]] = {"whole": whole}
    if side.tokens.shape[1] > 1:
        found |= {"change": change, "spread": spread}
    return found


def standard(train: Tensor, *others: Tensor) -> list[Tensor]:
    centre, width = train.mean(0), train.std(0) + 0.05
    return [(x - centre) / width / train.shape[1] ** 0.5 for x in (train, *others)]


def same_words(one: Side, other: Side) -> Tensor:
    return torch.tensor([[float(a == b) for b in other.questions] for a in one.questions])


def fit(kernel: Tensor, targets: Tensor, ridge: float) -> Tensor:
    scale = kernel.diagonal().mean()
    return torch.linalg.solve(kernel + ridge * scale * torch.eye(len(kernel)), targets)


def accuracy(scores: Tensor, side: Side, words: Sequence[str]) -> float:
    place = {word: index for index, word in enumerate(words)}
    right = 0
    for row, offered, answer in zip(scores, side.offered, side.answers, strict=True):
        known = [word for word in offered if word in place]
        right += bool(known) and max(known, key=lambda word: row[place[word]]) == answer
    return right / len(side)


def probe(
    train: Side, val: Side, test: Side, extra: Sequence[tuple[Tensor, Tensor, Tensor]] = ()
) -> tuple[float, float]:
    """(validation, test) accuracy of the reading and ridge that are best on validation."""
    best = (-1.0, 0.0)
    words = sorted({word for offered in train.offered for word in offered})
    onehot = torch.tensor([[float(answer == word) for word in words] for answer in train.answers])
    base = onehot.mean(0)
    varied = len(set(train.questions)) > 1
    for read in readings(train).values():
        parts = [standard(read(train), read(val), read(test))]
        parts += [standard(*one) for one in extra]
        seen, held, tested = (torch.cat(columns, dim=1) for columns in zip(*parts, strict=True))
        kernels = [x @ seen.T for x in (seen, held, tested)]
        if varied:
            kernels = [k * (1 + same_words(s, train)) for k, s in zip(kernels, (train, val, test), strict=True)]
        for ridge in RIDGES:
            dual = fit(kernels[0], onehot - base, ridge)
            on_val, on_test = (accuracy(k @ dual + base, s, words) for k, s in ((kernels[1], val), (kernels[2], test)))
            best = max(best, (on_val, on_test), key=lambda pair: pair[0])
    count = train.tokens.shape[1]
    if set(train.answers) <= set(PLACES[:count]) and count > 1:
        best = max(best, select(train, val, test), key=lambda pair: pair[0])
    return best


def select(train: Side, val: Side, test: Side) -> tuple[float, float]:
    """One score per picture; the question's words multiply the kernel."""
    count = train.tokens.shape[1]
    centred = [side.tokens - 0.5 * side.tokens.mean(1, keepdim=True) for side in (train, val, test)]
    seen, held, tested = standard(*(tokens.flatten(2).flatten(0, 1) for tokens in centred))
    target = torch.tensor([[float(PLACES[i] == answer) - 1 / count for i in range(count)] for answer in train.answers])
    kernels = []
    for side, inputs in ((train, seen), (val, held), (test, tested)):
        asked = same_words(side, train).repeat_interleave(count, 0).repeat_interleave(count, 1)
        kernels.append(inputs @ seen.T * (1 + asked))
    best = (-1.0, 0.0)
    for ridge in RIDGES:
        dual = fit(kernels[0], target.reshape(-1, 1), ridge)
        scores = [
            accuracy((k @ dual).view(-1, count), side, PLACES[:count])
            for k, side in ((kernels[1], val), (kernels[2], test))
        ]
        best = max(best, (scores[0], scores[1]), key=lambda pair: pair[0])
    return best


def picture_scores(relative: Side, *sides: Side) -> list[Tensor]:
    """What a relative's probe says of single pictures: scores of each picture, and of their mean."""
    words = sorted(set(relative.answers))
    onehot = torch.tensor([[float(answer == word) for word in words] for answer in relative.answers])
    pooled = relative.tokens.mean(1).flatten(1)
    inputs = [side.tokens.flatten(2).flatten(0, 1) for side in sides]
    seen, *others = standard(pooled, *inputs)
    dual = fit(seen @ seen.T, onehot - onehot.mean(0), 0.03)
    scores = [(x @ seen.T @ dual).view(len(side), -1, len(words)) for x, side in zip(others, sides, strict=True)]
    return [torch.cat([s.flatten(1), s.mean(1), s.std(1) if s.shape[1] > 1 else s.mean(1)], dim=1) for s in scores]


def joined(one: Side, other: Side) -> Side:
    return Side(
        torch.cat([one.tokens, other.tokens]),
        one.questions + other.questions,
        one.offered + other.offered,
        one.answers + other.answers,
    )


def draw(side: Side, size: int, seed: str) -> Side:
    """A sample in which every answer occurs about as often as in the whole."""
    order = list(range(len(side)))
    random.Random(seed).shuffle(order)
    queues: dict[str, list[int]] = {}
    for index in order:
        queues.setdefault(side.answers[index], []).append(index)
    rows: list[int] = []
    while len(rows) < min(size, len(side)):
        rows += [queue.pop() for queue in queues.values() if queue]
    rows = rows[:size]
    return Side(
        side.tokens[rows],
        tuple(side.questions[i] for i in rows),
        tuple(side.offered[i] for i in rows),
        tuple(side.answers[i] for i in rows),
    )


def helpers(spec: TaskSpec) -> list[TaskSpec]:
    """Trained relatives: strong ones, or weak ones where there is no strong one."""
    trained = {other.id for other in TASKS}
    strong = [name for name in relatives(spec.id) if name in trained]
    names = strong or [name for name in relatives(spec.id, strong=False) if name in trained]
    return [find_task(name) for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="*")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64, 320])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--val", type=int, default=100)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--alone", action="store_true", help="without relatives")
    parser.add_argument("--results", type=Path, default=Path("suite-probe.jsonl"))
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    library, store = load_library(), FeatureStore(EfficientNetTokens())
    rows = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    done = {(row["task"], row["n"], row["seed"]) for row in rows if row["suite"] == SUITE}
    loaded: dict[str, tuple[Task, Side, Side, Side]] = {}

    def sides(spec: TaskSpec) -> tuple[Task, Side, Side, Side]:
        if spec.name not in loaded:
            task = build_task(spec, library, Sizes(options.train, options.val, options.test))
            loaded[spec.name] = (task, *(load(examples, store) for examples in (task.train, task.val, task.test)))
        return loaded[spec.name]

    for spec in find_tasks(options.tasks):
        others = [] if options.alone else helpers(spec)
        wanted = [(n, seed) for n in options.sizes for seed in range(options.seeds)]
        if all((spec.id, n, seed) in done for n, seed in wanted):
            continue
        task, train, val, test = sides(spec)
        for n, seed in wanted:
            if (spec.id, n, seed) in done:
                continue
            mine = draw(train, n, f"{spec.id}/{seed}")
            alone = probe(mine, val, test)
            pooled, pool, extra = alone, mine, []
            for other in others:
                theirs = draw(sides(other)[1], n, f"{other.id}/{seed}")
                extra.append(tuple(picture_scores(theirs, mine, val, test)))
                if theirs.tokens.shape[1] == mine.tokens.shape[1] and set(theirs.answers) & set(mine.answers):
                    pool = joined(pool, theirs)
            candidates = [alone]
            if extra:
                candidates.append(probe(mine, val, test, extra))
            if len(pool) > len(mine):
                candidates.append(probe(pool, val, test))
            pooled = max(candidates, key=lambda pair: pair[0])
            row = {
                "suite": SUITE, "task": spec.id, "n": n, "seed": seed, "chance": chance(task),
                "val": alone[0], "test": alone[1], "pooled_val": pooled[0], "pooled_test": pooled[1],
                "relatives": [other.id for other in others],
            }  # fmt: skip
            rows.append(row)
            with options.results.open("a") as sink:
                sink.write(json.dumps(row) + "\n")
        print(spec.name, *(line(rows, spec.id, n) for n in options.sizes), flush=True)
        keep = {spec.name for spec in TASKS}
        loaded = {name: one for name, one in loaded.items() if name in keep and len(loaded) < 12}
    if options.write:
        options.write.write_text(table(rows, options.sizes))


def line(rows: Sequence[dict], task: str, n: int) -> str:
    found = [row for row in rows if row["task"] == task and row["n"] == n and row["suite"] == SUITE]
    if not found:
        return "-"
    return f"{100 * mean(r['test'] for r in found):.0f} → {100 * mean(r['pooled_test'] for r in found):.0f}"


def table(rows: Sequence[dict], sizes: Sequence[int]) -> str:
    heads = " | ".join(f"n = {n}" for n in sizes)
    lines = [f"| task | chance | probe, val | {heads} | gain | relatives |", "| --- " * (5 + len(sizes)) + "|"]
    for spec in find_tasks([]):
        found = [row for row in rows if row["task"] == spec.id and row["suite"] == SUITE]
        if not found:
            continue
        largest = [row for row in found if row["n"] == max(row["n"] for row in found)]
        gains = []
        for n in sizes:
            ones = [row["pooled_test"] - row["test"] for row in found if row["n"] == n]
            gains.append(f"{100 * mean(ones):+.0f}" if ones else "-")
        cells = " | ".join(line(rows, spec.id, n) for n in sizes)
        lines.append(
            f"| {spec.name} | {100 * found[0]['chance']:.0f} | {100 * mean(r['val'] for r in largest):.0f} | {cells} "
            f"| {' / '.join(gains)} | {' '.join(found[0]['relatives'])} |"
        )
    by_size = []
    for n in sizes:
        per_seed: dict[int, list[float]] = {}
        for row in rows:
            if row["n"] == n and row["suite"] == SUITE and row["relatives"] and row["task"][0] != "U":
                per_seed.setdefault(row["seed"], []).append(row["pooled_test"] - row["test"])
        means = [mean(values) for values in per_seed.values()]
        if len(means) > 1:
            by_size.append(f"{100 * mean(means):+.1f} ± {100 * stdev(means) / len(means) ** 0.5:.1f} at n = {n}")
    return "\n".join(lines) + "\n\nMean gain over the trained tasks with relatives: " + ", ".join(by_size) + ".\n"


if __name__ == "__main__":
    main()
