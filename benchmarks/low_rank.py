"""What exact means of low-rank products cost, against forming the d x d mean and taking its SVD.

    python -m benchmarks.low_rank

Prints one line per width: milliseconds of one mean of ten clients' rank-16 products by `product_mean`, of ten means
(one for each client) by `product_means`, of the mean of factors, and of the dense way, all on one thread; and how far
the exact mean is from the dense one. Ways take turns and the fastest of all turns counts, since a shared machine only
ever adds time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_pfl.functional.low_rank import Factors, product_mean, product_means


def clients(count: int, rank: int, width: int) -> list[Factors]:
    """Random square layers' adapters."""
    generator = torch.Generator().manual_seed(0)
    return [
        Factors(torch.randn(rank, width, generator=generator), torch.randn(width, rank, generator=generator))
        for _ in range(count)
    ]


def dense(factors: list[Factors], rank: int) -> Tensor:
    """The mean as a d x d matrix, cut to a rank."""
    mean = torch.stack([one.B @ one.A for one in factors]).mean(0)
    left, values, right = torch.linalg.svd(mean, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def fastest(ways: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Milliseconds per way."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(turns):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], 1000 * (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--turns", type=int, default=15)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for width in asked.widths:
        factors = clients(asked.clients, asked.rank, width)
        weights = [1.0] * asked.clients
        ways: dict[str, Callable[[], object]] = {
            "one mean": lambda: product_mean(factors, weights),  # noqa: B023 - called in this turn
            "one each": lambda: product_means(factors, torch.ones(len(factors), len(factors))),  # noqa: B023
            "factor mean": lambda: (
                torch.stack([one.A for one in factors]).mean(0),  # noqa: B023
                torch.stack([one.B for one in factors]).mean(0),  # noqa: B023
            ),
            "dense": lambda: dense(factors, asked.rank),  # noqa: B023
        }
        found = fastest(ways, asked.turns if width < 2048 else 2)
        exact = product_mean(factors, weights)
        expected = dense(factors, asked.rank)
        off = ((exact.factors.B @ exact.factors.A - expected).norm() / expected.norm()).item()
        told = ", ".join(f"{name} {cost:.2f} ms" for name, cost in found.items())
        print(f"width {width}: {told}; {found['dense'] / found['one mean']:.0f} times faster, off by {off:.1e}")


if __name__ == "__main__":
    main()
