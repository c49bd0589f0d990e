"""What noise on sketches does to relevance: who finds its relative, by epsilon, sketch size and number of examples.

    python -m benchmarks.relevance_under_noise            # the numbers and the picture of docs/concepts/privacy.md
    python -m benchmarks.relevance_under_noise --seeds 1 --rounds 2 --examples 100   # a look, in seconds

Eight clients, each with one relative. Two sources of sketches:

- *planted*: per-example gradients of length one in 65,536 dimensions. Half of an example's length is its task's mean
  direction; means of relatives have cosine .7 and of strangers .5 (in the first experiment the cosines of real tasks
  differed by .1 to .3 between relatives and strangers).
- *tiny*: `CausalLMProbe` on a random Llama of width 32: four kinds of question, two clients each, who ask in other
  words and meet other answers; every example's own gradient, clipped at the median length.

The noise is that of `noised_sketch`, its multiplier that of the budget for all releases, delta 1e-5. The server
averages sketches as `RelevanceAggregator` does (`ema`), and weighs by its default policy. Two numbers: how often a
client's own relative has the highest weight (chance 1/7), and the mean weight of the relative (uniform 1/7).
"""

from __future__ import annotations

import argparse
import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_pfl.benchmark.tiny import tiny_llama, tiny_tokenizer
from lightning_pfl.functional.accounting import PrivacyBudget
from lightning_pfl.functional.mechanisms import (
    ClientNoise,
    ExampleNoise,
    NoiseStream,
    SketchBound,
    SketchNoise,
    noised_sketch,
)
from lightning_pfl.functional.privacy import clip_rows
from lightning_pfl.functional.relevance import Peers, Softmax
from lightning_pfl.functional.similarity import Cosine
from lightning_pfl.relevance import CausalLMProbe, CountSketch

CLIENTS = tuple(f"client-{index}" for index in range(8))
DIMENSIONS = 65_536
OWN, RELATIVES, STRANGERS = 0.5, 0.7, 0.5
DELTA = 1e-5
SIZES = (64, 256, 1024, 4096, 16_384)


def planted(size: int, num_examples: int, seed: int) -> tuple[Tensor, float]:
    """Mean sketches ``[8, k]`` of clients with some examples each, and C."""
    draw = torch.Generator().manual_seed(seed)
    project = CountSketch(size, seed=seed)

    def direction() -> Tensor:
        return torch.randn(DIMENSIONS, generator=draw) / DIMENSIONS**0.5

    common, families = direction(), [direction() for _ in range(4)]
    rows = []
    for index in range(8):
        task = STRANGERS**0.5 * common + (RELATIVES - STRANGERS) ** 0.5 * families[index // 2]
        task = task + (1 - RELATIVES) ** 0.5 * direction()
        rest = ((1 - OWN**2) / num_examples) ** 0.5 * direction()  # of many independent examples, averaged
        rows.append(project(OWN * task + rest))
    return torch.stack(rows), 1.0


QUESTIONS = (
    ("What colour is the thing ?", "Which colour has the thing ?", "red green blue yellow"),
    ("What shape is drawn ?", "Which shape has the thing ?", "circle square triangle plus"),
    ("What is one , two , three ?", "Which is the four ?", "one two three four"),
    ("is the thing drawn ?", "has the thing a colour ?", "yes no"),
)


def tiny(size: int, num_examples: int, seed: int) -> tuple[Tensor, float]:
    """As `planted`, of real gradients; C is the median length of an example's sketch."""
    rows, max_norm = _tiny_rows(size, seed)
    return rows[:, :num_examples].double().mean(dim=1), max_norm


@functools.cache
def _tiny_rows(size: int, seed: int, most: int = 1000) -> tuple[Tensor, float]:
    """``[8, most, k]``, clipped."""
    tokenizer, chooser = tiny_tokenizer(), random.Random(seed)
    torch.manual_seed(seed)
    probe = CausalLMProbe(tiny_llama(seed=seed), size=size, seed=seed)
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]
    each = []
    for index in range(8):
        *asked, answers = QUESTIONS[index // 2]
        favourites = answers.split()[index % 2 :]
        texts = []
        for _ in range(most):
            hint = " ".join(chooser.choices(words, k=4))
            texts.append((f"{hint} {asked[index % 2]} Answer :", chooser.choice(favourites)))
        parts = [probe.sketches(_batch(tokenizer, texts[at : at + 100])) for at in range(0, most, 100)]
        each.append(torch.cat(parts))
    every = torch.stack(each)
    max_norm = float(every.flatten(0, 1).norm(dim=1).median())
    return torch.stack([clip_rows(rows, max_norm) for rows in every]), max_norm


def _batch(tokenizer: object, texts: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    encoded = [tokenizer(f"{prompt} {answer}")["input_ids"] for prompt, answer in texts]  # type: ignore[operator]
    length = max(map(len, encoded))
    ids = torch.tensor([[0] * (length - len(one)) + one for one in encoded])
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


@dataclass(frozen=True)
class Schedule:
    """How often sketches are sent, and how the server averages them."""

    rounds: int
    ema: float  # of `RelevanceAggregator`; 1 means the plain mean of all

    def __str__(self) -> str:
        how = "plain mean" if self.ema == 1 else f"ema {self.ema:g}"
        return "sent once" if self.rounds == 1 else f"{self.rounds} rounds, {how}"


@dataclass(frozen=True)
class Found:
    """How well relatives are found."""

    right: float  # share of clients whose relative has the highest weight
    weight: float  # mean weight of the relative


def relevance(
    source: Callable[[int, int, int], tuple[Tensor, float]],
    unit: type[ExampleNoise] | type[ClientNoise],
    *,
    size: int,
    num_examples: int,
    epsilon: float | None,
    schedule: Schedule,
    seeds: int,
) -> Found:
    """The mean over seeds; epsilon None is no noise."""
    right = weight = 0.0
    for seed in range(seeds):
        sketches, max_norm = source(size, num_examples, seed)
        bound = SketchBound(max_norm, num_examples)
        noise: SketchNoise | None = None
        if epsilon is not None:
            noise = unit(PrivacyBudget(epsilon, DELTA).noise_multiplier(releases=schedule.rounds))
        known = sketches.float()
        for round in range(schedule.rounds if noise is not None else 0):
            sent = []
            for client, sketch in zip(CLIENTS, sketches, strict=True):
                stream = NoiseStream(seed.to_bytes(32, "little"), client, round)
                sent.append(noised_sketch(sketch, noise, stream, bound=bound))
            kept = round / (round + 1) if schedule.ema == 1 else schedule.ema
            known = torch.stack(sent) if round == 0 else torch.stack(sent).lerp(known, kept)
        rows = Softmax().rows(Peers.fresh(list(CLIENTS), similarity=Cosine().matrix(known)))
        relatives = torch.arange(8) ^ 1
        right += (rows.argmax(dim=1) == relatives).double().mean().item() / seeds
        weight += rows[torch.arange(8), relatives].mean().item() / seeds
    return Found(right, weight)


def table(title: str, columns: Sequence[object], rows: dict[str, list[Found]]) -> None:
    """Print one table as markdown: percent right, and the relative's weight."""
    print(f"\n{title}\n\n| | {' | '.join(map(str, columns))} |\n| --- |{' --- |' * len(columns)}")
    for name, found in rows.items():
        print(f"| {name} | {' | '.join(f'{100 * one.right:.0f} % ({one.weight:.2f})' for one in found)} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--examples", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--picture", type=Path, help="where to write the curves (PNG)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    columns = [*(f"{epsilon:g}" for epsilon in given.epsilons), "no noise"]
    epsilons = [*given.epsilons, None]
    usual, once = Schedule(given.rounds, 0.5), Schedule(1, 0.5)
    curves: dict[str, dict[str, list[Found]]] = {}

    def sweep(title: str, settings: dict[str, dict[str, object]], unit: type = ExampleNoise) -> None:
        curves[title] = {
            name: [
                relevance(unit=unit, epsilon=epsilon, seeds=given.seeds, **setting)  # type: ignore[arg-type]
                for epsilon in epsilons
            ]
            for name, setting in settings.items()
        }
        table(title, columns, curves[title])

    for count in given.examples:
        sweep(
            f"Planted, one example hidden, n = {count:,}, {usual}",
            {
                f"k = {size:,}": {"source": planted, "size": size, "num_examples": count, "schedule": usual}
                for size in SIZES
            },
        )
    middle = given.examples[len(given.examples) // 2]
    sweep(
        f"Planted, one example hidden, n = {middle:,}, k = 1,024, schedules",
        {
            str(schedule): {"source": planted, "size": 1024, "num_examples": middle, "schedule": schedule}
            for schedule in (usual, Schedule(given.rounds, 1.0), once)
        },
    )
    sweep(
        f"Planted, a whole client hidden, {once}",
        {
            f"k = {size:,}": {"source": planted, "size": size, "num_examples": middle, "schedule": once}
            for size in SIZES
        },
        ClientNoise,
    )
    for count in (100, 1000):
        sweep(
            f"Tiny language model, one example hidden, n = {count:,}, {once}",
            {
                f"k = {size:,}": {"source": tiny, "size": size, "num_examples": count, "schedule": once}
                for size in SIZES[:4]
            },
        )
    if given.picture is not None:
        draw(curves, columns, given.picture)


def draw(curves: dict[str, dict[str, list[Found]]], columns: Sequence[str], path: Path) -> None:
    """One panel per table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, (len(curves) + 1) // 2, figsize=(17, 7.5), sharey=True)
    for panel, (title, lines) in zip(panels.flatten(), curves.items(), strict=False):
        for name, found in lines.items():
            panel.plot(range(len(columns)), [100 * one.right for one in found], marker="o", markersize=3, label=name)
        panel.axhline(100 / 7, color="gray", linestyle=":", linewidth=1)
        panel.set_title(title.replace(", one example", "\none example").replace(", a whole", "\na whole"), fontsize=9)
        panel.set_xticks(range(len(columns)), columns, fontsize=7)
        panel.set_xlabel("epsilon of the whole run (delta 1e-5)", fontsize=8)
        panel.legend(fontsize=7)
    for panel in panels[:, 0]:
        panel.set_ylabel("clients whose relative weighs most, %", fontsize=8)
    for panel in panels.flatten()[len(curves) :]:
        panel.axis("off")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()
