"""Measure systems on workloads, or make a table of what was measured.

    python -m benchmarks.engine W1 W2 --repeats 3 --lines build/engine.jsonl
    python -m benchmarks.engine W1 --systems loop local flower --lines build/engine.jsonl
    python -m benchmarks.engine --table build/engine.jsonl

Systems take turns, so that whatever else the machine does meets all of them. Peers are installed into environments of
their own when they are first needed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.engine.environments import PEERS, InstallError, environment
from benchmarks.engine.lines import Line, read
from benchmarks.engine.measure import measure
from benchmarks.engine.table import table
from benchmarks.engine.workload import WORKLOADS

SYSTEMS = {
    "loop": ("loop",),
    "fit": ("trainer", "fresh"),
    "fit, resumed": ("trainer", "resumed"),
    "pfl": ("pfl_research",),
    "LocalPool": ("federated", "local"),
    "flower": ("flower",),
    "RayPool": ("federated", "ray"),
}
"""Modules of `systems` with their further arguments; the bare loop is the floor of all."""

SPECIAL = {
    "W1-paired": {"LocalPool": ("paired",)},
    "W2-paired": {"LocalPool": ("paired",)},
    "W3-long-paired": {"LocalPool": ("paired",)},
    "W4": {"LocalPool": ("personal",)},
    "W5": {
        "fit": ("architectures", "fit"),
        "LocalPool": ("architectures", "local"),
        "RayPool": ("architectures", "ray"),
    },
    "W6": {"RayPool": ("backbone",)},
    "W7": {"loop": ("language", "loop"), "LocalPool": ("language", "local")},
    "W7-long": {"loop": ("language", "loop"), "LocalPool": ("language", "local")},
}
"""Workloads of their own making: who runs them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", choices=[*WORKLOADS, *SPECIAL, []], metavar="WORKLOAD", default=[])
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--lines", type=Path, help="where lines are added; the standard output has them in any case")
    parser.add_argument("--table", type=Path, help="make a table of these lines, and measure nothing")
    chosen = parser.parse_args()
    if chosen.table is not None:
        print(table(read(chosen.table.read_text().splitlines())), end="")
        return
    for workload in chosen.workloads:
        who = SPECIAL.get(workload, {name: SYSTEMS[name] for name in chosen.systems})
        for repeat in range(chosen.repeats):
            for system, (module, *further) in who.items():
                if workload in SPECIAL and system not in chosen.systems:
                    continue
                line = _run(workload, system, module, further, repeat)
                print(line.dump(), flush=True)
                if chosen.lines is not None:
                    line.append_to(chosen.lines)


def _run(workload: str, system: str, module: str, further: list[str], repeat: int) -> Line:
    try:
        python = str(environment(system)) if system in PEERS else sys.executable
    except InstallError as error:
        return Line(workload, system, repeat, error=f"cannot be installed: {error}")
    command = [python, "-m", f"benchmarks.engine.systems.{module}", "{}", *further]
    return measure(workload, system, command, repeat=repeat)


if __name__ == "__main__":
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home directory
    main()
