"""Find pictures that look like one of another side of the split, and list which to leave out.

    python benchmarks/near_duplicates.py [--write lightning_pfl/benchmark/suite/duplicates.txt] [--sheet pairs.png]

What counts as near is said in `lightning_pfl.benchmark.near_duplicates`. Of a pair on two sides one goes: a training
picture rather than a validation picture rather than a test picture; a public one always stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from lightning_pfl.benchmark.images import Picture, file_digest, open_square
from lightning_pfl.benchmark.near_duplicates import alike
from lightning_pfl.benchmark.suite.library import PHOTOGRAPHS, all_pictures, sides_of
from lightning_pfl.benchmark.suite.named import subject_of

_STAYS = ("public", "test", "val", "train")


def usable(picture: Picture) -> bool:
    """Whether any task might show it."""
    return picture.kind != "other" or picture.domain in PHOTOGRAPHS or subject_of(picture.concept) is not None


def main() -> None:
    """List the pairs; write the digests of those that go."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    everything = all_pictures()
    sides = dict(zip(everything, sides_of(everything), strict=True))
    pictures = [picture for picture in everything if usable(picture)]
    small = []
    for index, picture in enumerate(pictures):
        small.append(open_square(picture.path, 96))
        if index % 500 == 0:
            print(f"{index} of {len(pictures)} read", flush=True)
    pairs = alike(small, [_STAYS.index(sides[picture]) for picture in pictures])
    out: dict[str, str] = {}
    for pair in pairs:
        one, two = pictures[pair.first], pictures[pair.second]
        out.setdefault(
            file_digest(two.path)[:16],
            f"{sides[two]} {two.domain} {two.concept!r} looks like {sides[one]} {one.domain} {one.concept!r} "
            f"({pair.difference:.3f}, {pair.correlation:.3f})",
        )
    print(f"{len(pictures)} pictures, {len(pairs)} pairs, {len(out)} to leave out")
    if options.sheet:
        shown = pairs[:: max(1, len(pairs) // 120)]
        sheet = Image.new("RGB", (12 * 136, (len(shown) + 11) // 12 * 70), "white")
        for index, pair in enumerate(shown):
            for column, which in enumerate((pair.first, pair.second)):
                sheet.paste(open_square(pictures[which].path, 64), (index % 12 * 136 + column * 66, index // 12 * 70))
        sheet.save(options.sheet)
    if options.write:
        lines = [f"{digest} {why}" for digest, why in sorted(out.items())]
        head = "# first 16 hex of the sha256 of a file, and why it is left out\n"
        options.write.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
