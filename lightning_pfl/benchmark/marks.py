"""More that a task may do to a picture: damage it, colour it, draw a dial, bars or a cover over it.

As in `edits`, each is a pure function of its fields and of the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from PIL import Image, ImageDraw, ImageOps

from lightning_pfl.benchmark.edits import Edit

Colour = tuple[int, int, int]


@final
@dataclass(frozen=True)
class Colourise(Edit):
    """Keep light and dark but replace every hue by one; white stays white."""

    colour: Colour

    def apply(self, image: Image.Image) -> Image.Image:
        """Map grey levels to black, the colour and white."""
        grey = ImageOps.autocontrast(image.convert("L"))
        dark = tuple(part // 3 for part in self.colour)
        return ImageOps.colorize(grey, black=dark, white=(255, 255, 255), mid=self.colour, midpoint=150)


@final
@dataclass(frozen=True)
class Silhouette(Edit):
    """Paint everything that is not white with one colour."""

    colour: Colour = (0, 0, 0)

    def apply(self, image: Image.Image) -> Image.Image:
        """Threshold just below white."""
        solid = image.convert("L").point(lambda level: 255 if level < 240 else 0)
        return Image.composite(Image.new("RGB", image.size, self.colour), Image.new("RGB", image.size, "white"), solid)


@final
@dataclass(frozen=True)
class Scratch(Edit):
    """Draw a polyline; points are fractions of the side."""

    points: tuple[tuple[float, float], ...]
    colour: Colour
    width: float

    def apply(self, image: Image.Image) -> Image.Image:
        """Draw over a copy."""
        image = image.copy()
        side = image.width
        line = [(x * side, y * side) for x, y in self.points]
        ImageDraw.Draw(image).line(line, fill=self.colour, width=max(1, round(self.width * side)), joint="curve")
        return image


@final
@dataclass(frozen=True)
class Spots(Edit):
    """Draw filled discs (x, y, radius), in fractions of the side."""

    discs: tuple[tuple[float, float, float], ...]
    colour: Colour

    def apply(self, image: Image.Image) -> Image.Image:
        """Draw over a copy."""
        image = image.copy()
        side = image.width
        draw = ImageDraw.Draw(image)
        for x, y, radius in self.discs:
            box = ((x - radius) * side, (y - radius) * side, (x + radius) * side, (y + radius) * side)
            draw.ellipse(box, fill=self.colour)
        return image


@final
@dataclass(frozen=True)
class Break(Edit):
    """Cut the picture in two and move the parts against each other.

    Attributes:
        upright: cut from top to bottom; else from side to side.
        gap: white space between the parts, as a fraction of the side.
        slip: how far the second part moves along the cut, as a fraction of the side.
    """

    upright: bool
    gap: float
    slip: float

    def apply(self, image: Image.Image) -> Image.Image:
        """Cut and paste on white."""
        if not self.upright:
            turned = image.transpose(Image.Transpose.TRANSPOSE)
            return Break(True, self.gap, self.slip).apply(turned).transpose(Image.Transpose.TRANSPOSE)
        side = image.width
        half, gap, slip = side // 2, round(self.gap * side / 2), round(self.slip * side)
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image.crop((gap, 0, half, side)), (0, 0))
        canvas.paste(image.crop((half, 0, side - gap, side)), (half + gap, slip))
        return canvas


@final
@dataclass(frozen=True)
class Cover(Edit):
    """Fill a box (left, top, right, bottom, fractions of the side) with one colour."""

    box: tuple[float, float, float, float]
    colour: Colour

    def apply(self, image: Image.Image) -> Image.Image:
        """Fill it on a copy."""
        image = image.copy()
        ImageDraw.Draw(image).rectangle([part * image.width for part in self.box], fill=self.colour)
        return image


@final
@dataclass(frozen=True)
class Dial(Edit):
    """Lay a clock face over the picture, whose middle stays visible, with the two hands of a full or half hour.

    Attributes:
        minutes: since twelve o'clock.
        colour: of rim and hands.
        ticks: draw the twelve hour marks.
    """

    minutes: int
    colour: Colour
    ticks: bool = True

    def apply(self, image: Image.Image) -> Image.Image:
        """Shrink the picture into the face and draw."""
        side = image.width
        canvas = Image.new("RGB", image.size, "white")
        small = image.resize((side * 3 // 5, side * 3 // 5))
        canvas.paste(Image.blend(small, Image.new("RGB", small.size, "white"), 0.45), (side // 5, side // 5))
        draw = ImageDraw.Draw(canvas)
        width, middle = max(2, side // 24), side / 2
        draw.ellipse((width, width, side - width, side - width), outline=self.colour, width=width)
        for hour in range(12 if self.ticks else 0):
            draw.line([_on_dial(middle, hour / 12, 0.78), _on_dial(middle, hour / 12, 0.9)], self.colour, width // 2)
        draw.line([(middle, middle), _on_dial(middle, self.minutes / 720, 0.45)], self.colour, width + width // 2)
        draw.line([(middle, middle), _on_dial(middle, self.minutes % 60 / 60, 0.75)], self.colour, width // 2)
        return canvas


@final
@dataclass(frozen=True)
class Bars(Edit):
    """Draw a bar chart with the picture small in its upper left corner.

    Attributes:
        heights: 0 to 1, from left to right.
        colours: one per bar.
    """

    heights: tuple[float, ...]
    colours: tuple[Colour, ...]

    def apply(self, image: Image.Image) -> Image.Image:
        """Draw on white."""
        side = image.width
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image.resize((side // 5, side // 5)), (side // 16, 0))
        draw = ImageDraw.Draw(canvas)
        left, floor, room = side // 16, side * 15 // 16, side * 11 / 16
        step = (side - 2 * left) / len(self.heights)
        for index, (height, colour) in enumerate(zip(self.heights, self.colours, strict=True)):
            start = left + step * (index + 0.15)
            draw.rectangle((start, floor - height * room, start + step * 0.7, floor), fill=colour)
        draw.line([(left, side // 5), (left, floor), (side - left, floor)], (60, 60, 60), max(1, side // 64))
        return canvas


def _on_dial(middle: float, turn: float, radius: float) -> tuple[float, float]:
    """Point at a fraction of a full turn from twelve o'clock, at a fraction of the radius."""
    angle = 2 * math.pi * turn
    return middle + middle * radius * math.sin(angle), middle - middle * radius * math.cos(angle)
