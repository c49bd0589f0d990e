"""Measure every task of the suite: chance, a linear probe, and what the probe gains from the data of relatives.

    python benchmarks/suite_headroom.py [TASK ...] [--sizes 16 64 320] [--results benchmarks/suite_probe.jsonl]

The probe is a ridge regression on the frozen features of EfficientNet-Lite0, the same for every task, with a few
readings of an example among which the task's validation split chooses, as it does the ridge:

    whole    the pictures' tokens one after another
    change   differences of each picture's tokens to the next one's, and their absolute values
    spread   mean and standard deviation of the tokens over the pictures, and the last one against the others
    match    one score for a picture and a word, the highest of an example wins: every picture with the word that the
             question asks for (B2), or all pictures with every word that is offered (B11); or one score for a picture
             and the one that the question is about (U6)

Questions whose text varies enter the first three as a product: the kernel of two examples is multiplied by one plus one
if they ask in the same words. Answers are restricted to what an example offers.

With relatives (the strong links of the task graph that are trained on; the weak ones where there is none), the probe
may also take the relatives' examples as its own, where they match pictures with words or offer the same answers for as
many pictures; and the scores that each relative's own probe, trained on n of its examples, gives to the pictures, one
by one and on the mean. Validation chooses between these and going without. Results are kept line by line, so the script
goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Pairs:
    """Pictures and words that match or do not: tokens [m, width], words, targets [m], and each one's example."""

    tokens: Tensor
    words: tuple[str, ...]
    targets: Tensor
    owner: Tensor


@dataclass(frozen=True)
class Score:
    """Accuracy on validation, and which test examples were right."""

    val: float
    test: Tensor

    @property
    def accuracy(self) -> float:
        return float(self.test.float().mean())


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


def equal(ones: Sequence[str], others: Sequence[str]) -> Tensor:
    """[n, m], 1 where two texts are the same."""
    number = {text: index for index, text in enumerate(dict.fromkeys((*ones, *others)))}
    one, other = (torch.tensor([number[text] for text in texts]) for texts in (ones, others))
    return (one[:, None] == other[None]).float()


def fit(kernel: Tensor, targets: Tensor, ridge: float) -> Tensor:
    scale = kernel.diagonal().mean()
    return torch.linalg.solve(kernel + ridge * scale * torch.eye(len(kernel)), targets)


def right(scores: Tensor, side: Side, words: Sequence[str]) -> Tensor:
    """Which examples are right if the highest score among what is offered wins."""
    place = {word: index for index, word in enumerate(words)}
    found = []
    for row, offered, answer in zip(scores.tolist(), side.offered, side.answers, strict=True):
        known = [word for word in offered if word in place]
        found.append(bool(known) and max(known, key=lambda word: row[place[word]]) == answer)
    return torch.tensor(found)


def probe(train: Side, val: Side, test: Side, extra: Sequence[tuple[Tensor, Tensor, Tensor]] = ()) -> Score:
    """The reading and ridge that are best on validation."""
    words = sorted({word for offered in train.offered for word in offered})
    onehot = torch.tensor([[float(answer == word) for word in words] for answer in train.answers])
    base = onehot.mean(0)
    varied = len(set(train.questions)) > 1
    found: list[Score] = []
    for read in readings(train).values():
        parts = [standard(read(train), read(val), read(test))]
        parts += [standard(*one) for one in extra]
        seen, held, tested = (torch.cat(columns, dim=1) for columns in zip(*parts, strict=True))
        kernels = [x @ seen.T for x in (seen, held, tested)]
        if varied:
            kernels = [
                kernel * (1 + equal(side.questions, train.questions))
                for kernel, side in zip(kernels, (train, val, test), strict=True)
            ]
        for ridge in RIDGES:
            dual = fit(kernels[0], onehot - base, ridge)
            on_val, on_test = (right(k @ dual + base, s, words) for k, s in ((kernels[1], val), (kernels[2], test)))
            found.append(Score(float(on_val.float().mean()), on_test))
    return max(found, key=lambda score: score.val)


def topics(side: Side) -> tuple[str, ...]:
    """What is particular about each question: its words that not all of the task's questions have."""
    texts = [question.split("Choice list:")[0].split() for question in side.questions]
    shared = set(texts[0]).intersection(*map(set, texts))
    return tuple(" ".join(word for word in text if word not in shared).strip('?."') for text in texts)


def pairs(side: Side) -> Pairs | None:
    """A side as pictures and words that match or not; None where its answers are neither places nor words."""
    asked, count = topics(side), side.tokens.shape[1]
    answers = {word for offered in side.offered for word in offered}
    if count > 1 and answers <= set(PLACES[:count]):
        asked_of, shown = side.tokens[:, : count - len(answers)], side.tokens[:, count - len(answers) :]
        count = len(answers)
        if asked_of.shape[1]:  # U6 alone: each picture that is offered, compared to the one that the question is about
            first = asked_of.mean(1, keepdim=True)
            tokens = torch.cat([(shown - first).abs(), shown * first], dim=-1).flatten(2).flatten(0, 1)
        else:
            tokens = (shown - 0.5 * shown.mean(1, keepdim=True)).flatten(2).flatten(0, 1)
        words = [word for word in asked for _ in range(count)]
        targets = [float(PLACES[i] == answer) - 1 / count for answer in side.answers for i in range(count)]
        owner = torch.arange(len(side)).repeat_interleave(count)
        return Pairs(tokens, tuple(words), torch.tensor(targets), owner)
    pooled = side.tokens.mean(1).flatten(1)
    if answers == {"yes", "no"} and len(set(asked)) > 1:
        targets = [0.5 if answer == "yes" else -0.5 for answer in side.answers]
        return Pairs(pooled, asked, torch.tensor(targets), torch.arange(len(side)))
    if len(set(map(frozenset, side.offered))) > 1:
        owner = torch.tensor([index for index, offered in enumerate(side.offered) for _ in offered])
        words = [word for offered in side.offered for word in offered]
        targets = [
            float(word == answer) - 1 / len(offered)
            for offered, answer in zip(side.offered, side.answers, strict=True)
            for word in offered
        ]
        return Pairs(pooled[owner], tuple(words), torch.tensor(targets), owner)
    return None


def match(train: Side, val: Side, test: Side, others: Sequence[Side] = ()) -> Score | None:
    """Match pictures with words; `others` are relatives' examples."""
    mine = [pairs(side) for side in (train, val, test)]
    if mine[0] is None or mine[1] is None or mine[2] is None:
        return None
    seen = [mine[0], *(found for other in others if (found := pairs(other)) is not None)]
    words = tuple(word for one in seen for word in one.words)
    targets = torch.cat([one.targets for one in seen])
    learnt, held, tested = standard(torch.cat([one.tokens for one in seen]), mine[1].tokens, mine[2].tokens)
    kernels = [learnt @ learnt.T * equal(words, words)]
    kernels += [x @ learnt.T * equal(one.words, words) for x, one in ((held, mine[1]), (tested, mine[2]))]
    found = []
    for ridge in RIDGES:
        dual = fit(kernels[0], targets, ridge)
        on_val, on_test = (_best_pair(k @ dual, p) for k, p in ((kernels[1], mine[1]), (kernels[2], mine[2])))
        found.append(Score(float(on_val.float().mean()), on_test))
    return max(found, key=lambda score: score.val)


def _best_pair(scores: Tensor, pairs: Pairs) -> Tensor:
    """Whether each example's pair with the highest score is its right one; a lone pair is judged by its sign."""
    found = []
    for example in range(int(pairs.owner.max()) + 1):
        rows = (pairs.owner == example).nonzero().flatten()
        if len(rows) == 1:
            found.append(bool((scores[rows] > 0) == (pairs.targets[rows] > 0)))
        else:
            found.append(bool(pairs.targets[rows][scores[rows].argmax()] > 0))
    return torch.tensor(found)


def picture_scores(relative: Side, *sides: Side) -> list[Tensor]:
    """What a relative's probe says of single pictures: of each, of their mean, of the last against the others."""
    words = sorted(set(relative.answers))
    onehot = torch.tensor([[float(answer == word) for word in words] for answer in relative.answers])
    inputs = [side.tokens.flatten(2).flatten(0, 1) for side in sides]
    seen, *others = standard(relative.tokens.mean(1).flatten(1), *inputs)
    dual = fit(seen @ seen.T, onehot - onehot.mean(0), 0.03)
    scores = [(x @ seen.T @ dual).view(len(side), -1, len(words)) for x, side in zip(others, sides, strict=True)]
    if scores[0].shape[1] == 1:
        return [one.flatten(1) for one in scores]
    return [
        torch.cat([one.flatten(1), one.mean(1), one.std(1), (one[:, -1] - one[:, :-1].mean(1)).abs()], dim=1)
        for one in scores
    ]


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


def alone(mine: Side, val: Side, test: Side) -> Score:
    candidates = [probe(mine, val, test), match(mine, val, test)]
    return max((one for one in candidates if one is not None), key=lambda score: score.val)


def pooled(without: Score, mine: Side, val: Side, test: Side, theirs: Sequence[Side]) -> Score:
    """The best on validation of going without and of three ways to use relatives."""
    candidates: list[Score | None] = [without]
    if theirs:
        candidates.append(probe(mine, val, test, [tuple(picture_scores(one, mine, val, test)) for one in theirs]))
        candidates.append(match(mine, val, test, theirs))
    alike = [
        one for one in theirs if one.tokens.shape[1] == mine.tokens.shape[1] and set(one.answers) & set(mine.answers)
    ]
    if alike:
        pool = mine
        for one in alike:
            pool = joined(pool, one)
        candidates.append(probe(pool, val, test))
    return max((one for one in candidates if one is not None), key=lambda score: score.val)


def helpers(spec: TaskSpec) -> list[TaskSpec]:
    """Trained relatives: strong ones, or weak ones where there is no strong one."""
    trained = {other.id for other in TASKS}
    strong = [name for name in relatives(spec.id) if name in trained]
    names = strong or [name for name in relatives(spec.id, strong=False) if name in trained]
    return [find_task(name) for name in names]


def draws(n: int, there: int, seeds: int) -> range:
    """One draw where it takes most of what is there, else `seeds`."""
    return range(1 if 5 * n > 4 * there else seeds)


def measured(options: argparse.Namespace, rows: list[dict]) -> Iterator[dict]:
    """The rows that are missing, one by one."""
    library, store = load_library(), FeatureStore(EfficientNetTokens())
    done = {(row["task"], row["n"], row["seed"]) for row in rows if row["suite"] == SUITE}
    loaded: dict[str, tuple[Task, Side, Side, Side]] = {}

    def sides(spec: TaskSpec) -> tuple[Task, Side, Side, Side]:
        if spec.name not in loaded:
            while len(loaded) >= options.keep:
                del loaded[next(iter(loaded))]
            task = build_task(spec, library, Sizes(options.train, options.val, options.test))
            loaded[spec.name] = (task, *(load(examples, store) for examples in (task.train, task.val, task.test)))
        return loaded[spec.name]

    for spec in find_tasks(options.tasks):
        wanted = [(n, s) for n in options.sizes for s in draws(n, options.train, options.seeds)]
        for n, seed in wanted:
            if (spec.id, n, seed) in done:
                continue
            start = time.process_time()
            others = [] if options.alone else helpers(spec)
            task, train, val, test = sides(spec)
            mine = draw(train, n, f"{spec.id}/{seed}")
            theirs = [draw(sides(other)[1], n, f"{other.id}/{seed}") for other in others]
            own = alone(mine, val, test)
            more = pooled(own, mine, val, test, theirs)
            yield {
                "suite": SUITE, "task": spec.id, "n": n, "seed": seed, "chance": chance(task), "examples": len(test),
                "val": own.val, "test": own.accuracy, "pooled_val": more.val, "pooled_test": more.accuracy,
                "won": int((more.test & ~own.test).sum()), "lost": int((own.test & ~more.test).sum()),
                "relatives": [other.id for other in others], "cpu_s": round(time.process_time() - start, 1),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="*")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64, 320])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--val", type=int, default=100)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--keep", type=int, default=12, help="tasks whose features are kept in memory")
    parser.add_argument("--alone", action="store_true", help="without relatives")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("suite_probe.jsonl"))
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    for row in measured(options, rows):
        rows.append(row)
        with options.results.open("a") as sink:
            sink.write(json.dumps(row) + "\n")
        print(row["task"], row["n"], row["seed"], row["test"], row["pooled_test"], row["cpu_s"], flush=True)


if __name__ == "__main__":
    main()
