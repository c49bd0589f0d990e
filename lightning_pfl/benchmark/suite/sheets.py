"""Contact sheets: examples of tasks as a person sees them, pictures side by side over question and answer.

Start at `contact_sheet`. `clean_examples` picks examples whose pictures may be shown in documentation.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import final

from PIL import Image, ImageDraw, ImageFont

from lightning_pfl.benchmark.composition import files_of
from lightning_pfl.benchmark.images import Picture
from lightning_pfl.benchmark.suite.library import Library
from lightning_pfl.benchmark.tasks import IMAGE_MARK, Example, Task

FREE = ("Apache-2.0", "MIT", "CC-PDDC", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0")
"""Licences under which a picture may stand on a documentation page that names its source."""

_LINE = 13
_MARGIN = 6


@final
@dataclass(frozen=True)
class Row:
    """Examples of one task, side by side, under its name."""

    title: str
    examples: tuple[Example, ...]


def contact_sheet(rows: Sequence[Row], *, pixels: int = 96, columns: int = 2) -> Image.Image:
    """Draw rows under each other, `columns` of them side by side.

    Args:
        rows: what to show; at least one.
        pixels: side of each picture.
        columns: rows that share a line.

    Raises:
        ValueError: no row.
    """
    if not rows:
        raise ValueError("`rows` must hold at least one task, but is empty.")
    panels = [_panel(row, pixels) for row in rows]
    width = max(panel.width for panel in panels)
    lines = [panels[at : at + columns] for at in range(0, len(panels), columns)]
    heights = [max(panel.height for panel in line) for line in lines]
    sheet = Image.new("RGB", (columns * (width + _MARGIN), sum(heights) + _MARGIN * len(lines)), "white")
    top = 0
    for line, height in zip(lines, heights, strict=True):
        for column, panel in enumerate(line):
            sheet.paste(panel, (column * (width + _MARGIN), top))
        top += height + _MARGIN
    return sheet


def clean_examples(
    task: Task, library: Library, count: int, licences: Collection[str] = FREE
) -> tuple[tuple[Example, ...], tuple[Picture, ...]]:
    """The first training examples with different answers whose pictures all have one of the licences.

    Returns:
        Up to `count` examples, and the pictures that they show.
    """
    chosen: list[Example] = []
    for example in task.train:
        pictures = list(_pictures(example, library))
        if len(chosen) < count and all(picture.licence in licences for picture in pictures):
            fresh = example.answer not in {other.answer for other in chosen}
            if fresh and not {p.concept for p in pictures} & {p.concept for o in chosen for p in _pictures(o, library)}:
                chosen.append(example)
    shown = dict.fromkeys(picture for example in chosen for picture in _pictures(example, library))
    return tuple(chosen), tuple(shown)


def _pictures(example: Example, library: Library) -> Iterator[Picture]:
    for view in example.images:
        for path in files_of(view):
            yield library.picture(path)


def _panel(row: Row, pixels: int) -> Image.Image:
    tiles = [_example(example, pixels) for example in row.examples]
    width = max([sum(tile.width + _MARGIN for tile in tiles), 4 * pixels])
    panel = Image.new("RGB", (width, 20 + max([tile.height for tile in tiles], default=0)), "white")
    draw = ImageDraw.Draw(panel)
    draw.rectangle((0, 0, width, 17), fill=(232, 236, 244))
    draw.text((4, 2), row.title, fill="black", font=ImageFont.load_default(12))
    left = 0
    for tile in tiles:
        panel.paste(tile, (left, 20))
        left += tile.width + _MARGIN
    return panel


def _example(example: Example, pixels: int) -> Image.Image:
    width = max(len(example.images) * (pixels + 2), 200)
    question = example.question.replace(IMAGE_MARK, "").strip()
    lines = [line for part in (question, f"Answer: {example.answer}") for line in textwrap.wrap(part, width // 6)]
    tile = Image.new("RGB", (width, pixels + 4 + _LINE * len(lines) + 4), "white")
    draw = ImageDraw.Draw(tile)
    for place, view in enumerate(example.images):
        left = place * (pixels + 2)
        tile.paste(view.render(pixels), (left, 1))
        draw.rectangle((left, 0, left + pixels, pixels + 1), outline=(190, 190, 190))
    for index, line in enumerate(lines):
        colour = (0, 90, 30) if line.startswith("Answer:") else (40, 40, 40)
        draw.text((0, pixels + 4 + index * _LINE), line, fill=colour, font=ImageFont.load_default(11))
    return tile
