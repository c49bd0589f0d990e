"""Which pictures look nearly the same: shifted, scaled, mirrored, recompressed or recoloured copies.

Start at `alike`. Every picture is cut to what is not white and scaled to 24 x 24; two are alike if they, or one and the
other's mirror image, differ little in colour, or if their grey levels correlate almost perfectly (a recoloured copy).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageOps

MOST_DIFFERENCE = 0.06
"""Root mean square difference of colours on the scale 0 to 1 below which two pictures are alike."""
LEAST_CORRELATION = 0.97
"""Correlation of grey levels above which two pictures are alike."""

_SIDE = 24
_ROWS = 512
_FLAT = 8.0  # grey levels: a picture that varies less is no evidence of likeness


@final
@dataclass(frozen=True)
class Pair:
    """Two pictures that are alike, by their indices, and how much."""

    first: int
    second: int
    difference: float
    correlation: float


def alike(images: Sequence[Image.Image], groups: Sequence[int]) -> list[Pair]:
    """All near-duplicates across groups; `first` is of the group with the lower number.

    Args:
        images: RGB pictures on white, of any sizes.
        groups: number of each picture's group; two of one group are not compared.

    Example:
        >>> wedge = Image.linear_gradient("L").convert("RGB")
        >>> [(pair.first, pair.second) for pair in alike([wedge, wedge.resize((90, 90)), wedge.rotate(90)], [0, 1, 1])]
        [(0, 1)]
    """
    if not images:
        return []
    small = [reduced(image) for image in images]
    mirrored = [ImageOps.mirror(image) for image in small]
    colours, levels = (_colours(small), _colours(mirrored)), (_levels(small), _levels(mirrored))
    place = np.asarray(groups)
    found: list[Pair] = []
    for start in range(0, len(small), _ROWS):  # a few rows at a time: all at once are gigabytes for a few thousand
        rows = slice(start, start + _ROWS)
        difference = np.minimum(*(_distance(colours[0][rows], other) for other in colours))
        correlation = np.maximum(*(levels[0][rows] @ other.T for other in levels)) / levels[0].shape[1]
        near = (difference < MOST_DIFFERENCE) | (correlation > LEAST_CORRELATION)
        for row, second in zip(*np.nonzero(near & (place[rows, None] < place[None])), strict=True):
            pair = float(difference[row, second]), float(correlation[row, second])
            found.append(Pair(start + int(row), int(second), *pair))
    return found


def reduced(image: Image.Image) -> Image.Image:
    """What is not white of an RGB picture, scaled to 24 x 24."""
    ink = ImageChops.invert(image.convert("L")).point(lambda level: 255 if level > 12 else 0)
    box = ink.getbbox()
    return (image.crop(box) if box else image).resize((_SIDE, _SIDE), Image.Resampling.BOX)


def _colours(images: Sequence[Image.Image]) -> NDArray[np.float32]:
    """Colours on the scale 0 to 1 [n, 1728]."""
    levels = np.stack([np.asarray(image, dtype=np.float32).ravel() for image in images])
    colours: NDArray[np.float32] = np.divide(levels, 255, dtype=np.float32)
    return colours


def _distance(ones: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """Root mean square difference of every pair [n, m]."""
    squared = (ones**2).sum(1)[:, None] + (others**2).sum(1)[None] - 2 * ones @ others.T
    distance: NDArray[np.float32] = np.sqrt(np.maximum(squared, 0) / ones.shape[1])
    return distance


def _levels(images: Sequence[Image.Image]) -> NDArray[np.float32]:
    """Standardised grey levels [n, 576]."""
    levels = np.stack([np.asarray(image.convert("L"), dtype=np.float32).ravel() for image in images])
    levels -= levels.mean(1, keepdims=True)
    standard: NDArray[np.float32] = levels / np.maximum(levels.std(1, keepdims=True), _FLAT)
    return standard
