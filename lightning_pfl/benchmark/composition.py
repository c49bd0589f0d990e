"""Pictures made of several pictures: `Paste` puts a view onto another, `scene` arranges views on white."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, final

from PIL import Image

from lightning_pfl.benchmark.edits import Edit, Place
from lightning_pfl.benchmark.images import View, file_digest


@final
@dataclass(frozen=True, repr=False)
class Paste(Edit):
    """Put another view over the picture, opaque, white background included.

    Its `repr` names the other file by the digest of its bytes, so that keys do not depend on where a cache lies.

    Attributes:
        view: what is pasted.
        x: left edge, as a fraction of the side.
        y: top edge, as a fraction of the side.
        scale: side of the pasted square, as a fraction of the side.
    """

    view: View
    x: float
    y: float
    scale: float

    def __repr__(self) -> str:
        return f"Paste({file_digest(self.view.path)}, {self.view.edits}, {self.x}, {self.y}, {self.scale})"

    def apply(self, image: Image.Image) -> Image.Image:
        """Render the other view small and paste it."""
        image = image.copy()
        side = image.width
        small = self.view.render(max(1, round(self.scale * side)))
        image.paste(small, (round(self.x * side), round(self.y * side)))
        return image


@final
@dataclass(frozen=True)
class Item:
    """A view at a place of a scene; `x`, `y` (left, top) and `scale` are fractions of the scene's side."""

    view: View
    x: float
    y: float
    scale: float


def scene(items: Sequence[Item]) -> View:
    """Arrange views on white; later ones lie over earlier ones.

    Raises:
        ValueError: no item.
    """
    if not items:
        raise ValueError("`items` must hold at least one item, but is empty.")
    first, *rest = items
    placed = (*first.view.edits, Place(first.x, first.y, first.scale))
    return View(first.view.path, placed + tuple(Paste(item.view, item.x, item.y, item.scale) for item in rest))


def edited(view: View, *edits: Edit) -> View:
    """The view after some more edits."""
    return replace(view, edits=(*view.edits, *edits))


def files_of(view: View) -> Iterator[Path]:
    """Every image file that a view shows, pasted ones included."""
    yield cast(Path, view.path)  # compositions are made of pictures in the cache, never of remote ones
    for edit in view.edits:
        if isinstance(edit, Paste):
            yield from files_of(edit.view)
