"""What a task may do to a picture: small frozen records that say it and do it.

Every edit is a pure function of its fields and of the image; randomness is a seed among the fields. Their `repr` is
part of the key under which features are cached.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter


@dataclass(frozen=True)
class Edit(ABC):
    """A change of an RGB image."""

    @abstractmethod
    def apply(self, image: Image.Image) -> Image.Image:
        """A new image of the same size; the argument is left alone."""


@final
@dataclass(frozen=True)
class Blur(Edit):
    """Gaussian blur; `radius` in pixels."""

    radius: float

    def apply(self, image: Image.Image) -> Image.Image:
        """Blur it."""
        return image.filter(ImageFilter.GaussianBlur(self.radius))


@final
@dataclass(frozen=True)
class Noise(Edit):
    """Independent Gaussian noise on every channel; `sd` on the scale 0 to 255."""

    sd: float
    seed: int

    def apply(self, image: Image.Image) -> Image.Image:
        """Add noise and clip to 0..255."""
        pixels = np.asarray(image, dtype=np.float32)
        noise = np.random.default_rng(self.seed).standard_normal(pixels.shape, dtype=np.float32)
        return Image.fromarray(np.clip(np.rint(pixels + self.sd * noise), 0, 255).astype(np.uint8))


@final
@dataclass(frozen=True)
class Brightness(Edit):
    """Multiply brightness; below 1 darkens."""

    factor: float

    def apply(self, image: Image.Image) -> Image.Image:
        """Scale the pixels."""
        return ImageEnhance.Brightness(image).enhance(self.factor)


@final
@dataclass(frozen=True)
class Contrast(Edit):
    """Stretch or flatten contrast about the mean grey; below 1 flattens."""

    factor: float

    def apply(self, image: Image.Image) -> Image.Image:
        """Blend with the mean grey."""
        return ImageEnhance.Contrast(image).enhance(self.factor)


@final
@dataclass(frozen=True)
class Jpeg(Edit):
    """Lossy compression and back; `quality` from 1 (worst) to 95."""

    quality: int

    def apply(self, image: Image.Image) -> Image.Image:
        """Compress and decompress."""
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=self.quality)
        return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


@final
@dataclass(frozen=True)
class Pixelate(Edit):
    """Scale down to `side` pixels and up again in blocks."""

    side: int

    def apply(self, image: Image.Image) -> Image.Image:
        """Average blocks."""
        small = image.resize((self.side, self.side), Image.Resampling.BOX)
        return small.resize(image.size, Image.Resampling.NEAREST)


@final
@dataclass(frozen=True)
class Turn(Edit):
    """Rotate by quarters, counter-clockwise, and mirror first if asked."""

    quarters: int
    mirror: bool = False

    def apply(self, image: Image.Image) -> Image.Image:
        """Rotate; exact, no resampling."""
        if self.mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image.rotate(90 * self.quarters)


@final
@dataclass(frozen=True)
class Crop(Edit):
    """Cut out a box (left, top, right, bottom as fractions of the side) and scale it back to full size."""

    box: tuple[float, float, float, float]

    def apply(self, image: Image.Image) -> Image.Image:
        """Cut and scale."""
        left, top, right, bottom = (round(part * side) for part, side in zip(self.box, image.size * 2, strict=True))
        return image.crop((left, top, right, bottom)).resize(image.size, Image.Resampling.BICUBIC)


@final
@dataclass(frozen=True)
class Place(Edit):
    """Shrink the image and put it on a plain background.

    Attributes:
        x: left edge, as a fraction of the side.
        y: top edge, as a fraction of the side.
        scale: side of the shrunk image, as a fraction of the side.
        background: RGB, 0 to 255.
    """

    x: float
    y: float
    scale: float
    background: tuple[int, int, int] = (255, 255, 255)

    def apply(self, image: Image.Image) -> Image.Image:
        """Shrink and paste."""
        width, height = image.size
        canvas = Image.new("RGB", image.size, self.background)
        small = image.resize((max(1, round(width * self.scale)), max(1, round(height * self.scale))))
        canvas.paste(small, (round(width * self.x), round(height * self.y)))
        return canvas


@final
@dataclass(frozen=True)
class Tint(Edit):
    """Blend with one colour; `strength` from 0 (no change) to 1 (only the colour)."""

    colour: tuple[int, int, int]
    strength: float

    def apply(self, image: Image.Image) -> Image.Image:
        """Blend."""
        return Image.blend(image, Image.new("RGB", image.size, self.colour), self.strength)


@final
@dataclass(frozen=True)
class Mark(Edit):
    """Draw the outline of a regular polygon, or a circle, over the picture.

    Attributes:
        corners: 3 and more for a polygon, 0 for a circle.
        x: centre, as a fraction of the side.
        y: centre, as a fraction of the side.
        radius: to the corners, as a fraction of the side.
        colour: RGB, 0 to 255.
        turn: degrees.
    """

    corners: int
    x: float
    y: float
    radius: float
    colour: tuple[int, int, int]
    turn: float = 0.0

    def apply(self, image: Image.Image) -> Image.Image:
        """Draw."""
        image = image.copy()
        side = image.width
        radius, width = self.radius * side, max(2, side // 24)
        draw = ImageDraw.Draw(image)
        if self.corners:
            circle = (self.x * side, self.y * side, radius)
            draw.regular_polygon(circle, self.corners, rotation=self.turn, outline=self.colour, width=width)
        else:
            box = [self.x * side - radius, self.y * side - radius, self.x * side + radius, self.y * side + radius]
            draw.ellipse(box, outline=self.colour, width=width)
        return image


@final
@dataclass(frozen=True)
class Repeat(Edit):
    """Several small copies of the picture on white, without overlap; `places` are cells of a 3 x 3 grid, 0 to 8."""

    places: tuple[int, ...]

    def apply(self, image: Image.Image) -> Image.Image:
        """Shrink and paste."""
        canvas = Image.new("RGB", image.size, "white")
        cell = image.width // 3
        small = image.resize((cell - 2, cell - 2))
        for place in self.places:
            canvas.paste(small, (place % 3 * cell + 1, place // 3 * cell + 1))
        return canvas
