"""Write down what every task's records and pixels must be, for `lightning-pfl benchmark verify` to check against.

    python benchmarks/suite_digests.py FOLDER --write lightning_pfl/benchmark/suite/digests.txt [TASK ...]

FOLDER holds, or gets, the whole suite at the standard size (`standard/`) and the small one (`smoke/`), both at the
standard resolution. Run it under constraints.txt, and only when the suite's name changes: other digests are another
suite. Without --write, tasks that differ from the list are named.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_pfl.benchmark.suite.build import build, views_of
from lightning_pfl.benchmark.suite.catalogue import find_tasks
from lightning_pfl.benchmark.suite.digests import (
    NAMED_SIZES,
    PIXELS,
    expected_digests,
    pixels_of,
    record_digests,
    task_digests,
    written_digests,
)
from lightning_pfl.benchmark.suite.library import load_library
from lightning_pfl.benchmark.suite.recipes import build_task
from lightning_pfl.benchmark.suite.rendering import picture_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("tasks", nargs="*")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    specs, library, found = find_tasks(options.tasks), load_library(), {}
    if options.write and options.tasks:
        parser.error("--write needs all tasks")
    for name, sizes in NAMED_SIZES.items():
        root = options.folder / name
        build(specs, library, root, sizes=sizes, pixels=PIXELS)
        for spec in specs:
            views = views_of(build_task(spec, library, sizes))
            contents = (pixels_of(picture_path(root / spec.name / "images", view, PIXELS)) for view in views)
            found[name, spec.name] = task_digests(record_digests(root, spec.name), contents)
    if options.write:
        options.write.write_text(written_digests(found), encoding="utf8")
        return
    other = [key for key, digests in found.items() if digests != expected_digests(key[1], NAMED_SIZES[key[0]], PIXELS)]
    print(f"{len(found)} compared, {len(other)} differ: {other}")
    sys.exit(bool(other))


if __name__ == "__main__":
    main()
