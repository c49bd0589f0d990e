"""Write down what every task's records and pixels must be, for `lightning-pfl benchmark verify` to check against.

    python benchmarks/suite_digests.py FOLDER [TASK ...] [--write lightning_pfl/benchmark/suite/digests.txt]

FOLDER holds, or gets, the suite at the standard size and resolution. Run it under constraints.txt, and write only when
the suite's name changes: other digests are another suite. Without --write, tasks that differ from the list are named.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lightning_pfl.benchmark.records import SPLITS, records_path
from lightning_pfl.benchmark.suite.build import build
from lightning_pfl.benchmark.suite.catalogue import find_tasks
from lightning_pfl.benchmark.suite.digests import (
    PIXELS,
    TaskDigests,
    expected_digests,
    pixels_of,
    record_digests,
    task_digests,
    written_digests,
)
from lightning_pfl.benchmark.suite.library import load_library
from lightning_pfl.benchmark.suite.recipes import STANDARD


def digests(root: Path, name: str) -> TaskDigests:
    """Of what lies in a folder."""
    records = [json.loads(records_path(root, name, 0, split).read_text(encoding="utf8")) for split in SPLITS]
    files = dict.fromkeys(image for split in records for record in split for image in record["image"])
    return task_digests(record_digests(root, name), (pixels_of(root / file) for file in files))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("tasks", nargs="*")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    if options.write and options.tasks:
        parser.error("--write needs all tasks")
    specs = find_tasks(options.tasks)
    build(specs, load_library(), options.folder, sizes=STANDARD, pixels=PIXELS)
    found = {}
    for spec in specs:
        found[spec.name] = digests(options.folder, spec.name)
        print(spec.name, found[spec.name].pictures, flush=True)
    if options.write:
        options.write.write_text(written_digests(found), encoding="utf8")
        return
    other = [name for name, one in found.items() if one != expected_digests(name, STANDARD, PIXELS)]
    print(f"{len(found)} compared, {len(other)} differ: {other}")
    sys.exit(bool(other))


if __name__ == "__main__":
    main()
