"""What mixing N clients costs, against the one matrix product that it is.

    OMP_NUM_THREADS=1 python -m benchmarks.mixing

Payloads are P and Q of 28 layers of rank 16 (7,616 numbers). `BLAS` is the bare product of an [N, N] and an [N, 7616]
matrix that lie ready; `mix` starts from N vectors and ends with N vectors, as the server does; `top 32` is `mix` with
32 weights per row. The two take turns, the fastest of all turns counts. Memory is what `mix` had in use at its highest
beyond its arguments and its result. Prints a table, and a line of JSON per N with ``--json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_pfl.functional.averaging import mix
from lightning_pfl.types import FlatTensors, Layout

NUMBERS = 28 * (16 * 16 + 16)


def timed(run: Callable[[], object]) -> float:
    """CPU seconds."""
    start = time.process_time()
    run()
    return time.process_time() - start


def peak(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes of resident memory: at the highest while something runs, and after, both beyond those before."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far
    kept = run()
    highest, after = resident("VmHWM"), resident("VmRSS")
    del kept
    return highest - before, after - before


def resident(field: str) -> int:
    """A field of this process' status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def few(count: int, kept: int) -> torch.Tensor:
    """Rows with so many weights."""
    rows = torch.zeros(count, count)
    places = torch.randint(count, (count, kept))
    return rows.scatter_(1, places, 1.0)


def measure(count: int, turns: int) -> dict[str, float]:
    """One N."""
    layout = Layout(("P",), ((NUMBERS,),))
    flats = [FlatTensors(layout, torch.randn(NUMBERS)) for _ in range(count)]
    rows = torch.rand(count, count)
    highest, after = peak(lambda: mix(flats, rows))
    values, out = torch.stack([flat.vector for flat in flats]), torch.empty(count, NUMBERS)
    sparse = few(count, 32)
    best = {"BLAS": float("inf"), "mix": float("inf"), "top 32": float("inf")}
    runs = {
        "BLAS": lambda: torch.mm(rows, values, out=out),
        "mix": lambda: mix(flats, rows),
        "top 32": lambda: mix(flats, sparse),
    }
    for _ in range(turns):
        for name, run in runs.items():
            best[name] = min(best[name], timed(run))
    return {
        "clients": count,
        **{f"{name}_s": seconds for name, seconds in best.items()},
        "ratio": best["mix"] / best["BLAS"],
        "extra_mib": (highest - after) / 2**20,
        "result_mib": count * NUMBERS * 4 / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    print("clients |    BLAS s |     mix s | ratio | top 32 s | extra MiB | result MiB")
    for count in chosen.clients:
        found = measure(count, chosen.turns)
        print(
            f"{count:7d} | {found['BLAS_s']:9.4f} | {found['mix_s']:9.4f} | {found['ratio']:5.2f} | "
            f"{found['top 32_s']:8.4f} | {found['extra_mib']:9.1f} | {found['result_mib']:10.1f}",
            flush=True,
        )
        if chosen.json:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
