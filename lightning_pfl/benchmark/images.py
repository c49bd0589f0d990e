"""Labelled pictures, what may be done to them, and on which side of the split they belong.

Start at `Picture` (a file with its concept, category, domain and licence) and `View` (a picture and the edits that
make what a model sees). A split is by concept, so that no drawing of a thing, by whatever artist, is both trained and
tested.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lightning_pfl.benchmark.edits import Edit
from lightning_pfl.benchmark.locations import AnyPath


@dataclass(frozen=True)
class Picture:
    """One image file of a package.

    Attributes:
        path: PNG, WebP, JPEG or SVG file; a transparent background is shown as white.
        concept: what is shown, normalised; all pictures of a concept lie on one side of every split.
        category: kind and class, such as "animal/bird"; "other" where the source gives none that tasks use.
        domain: whose drawings or photographs these are, such as "google" or "photo".
        caption: a few words that name it.
        licence: of this file.
    """

    path: Path
    concept: str
    category: str
    domain: str
    caption: str
    licence: str

    @property
    def kind(self) -> str:
        """First part of the category."""
        return self.category.split("/")[0]

    @property
    def sort(self) -> str:
        """Last part of the category."""
        return self.category.split("/")[-1]


@dataclass(frozen=True)
class View:
    """What a model is shown: an image file after some edits, in order.

    Attributes:
        path: the image file, local or an fsspec path.
        edits: applied one after the other to the picture on white, already at its final size.
    """

    path: AnyPath
    edits: tuple[Edit, ...] = ()

    def render(self, size: int) -> Image.Image:
        """The picture as an RGB image of `size` x `size` pixels, padded to a square with white, then edited.

        Raises:
            ValueError: a damaged or truncated image; the message names the file.
        """
        image = open_square(self.path, size)
        for edit in self.edits:
            image = edit.apply(image)
        return image

    def key(self, size: int) -> str:
        """Digest of all that decides the pixels: the file's bytes, the edits and the size."""
        parts = (file_digest(self.path), str(size), *(repr(edit) for edit in self.edits))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.lru_cache(maxsize=4096)  # 200 MB at 128 pixels; most of what a build costs is opening pictures again
def open_square(path: AnyPath, size: int) -> Image.Image:
    """Read an image, put it on a white square and scale it to `size` x `size` RGB.

    Edits leave their argument alone, so the result is kept and shared.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged image; the message names the file.
    """
    try:
        if path.suffix in {".svg", ".svgz"}:
            image = _rasterised(path, size).convert("RGBA")
        else:
            with path.open("rb") as stream:
                image = Image.open(stream).convert("RGBA")
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


@functools.lru_cache(maxsize=65536)
def file_digest(path: AnyPath) -> str:
    """sha256 of a file, read once per process."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def normalise(name: str) -> str:
    """One spelling for a concept: lower case, words separated by single spaces, no article, digits or plural.

    Example:
        >>> normalise("Bananas_02"), normalise("A chimpanzee."), normalise("CAT FACE"), normalise("cherries")
        ('banana', 'chimpanzee', 'cat', 'cherry')
    """
    name = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word]
    if words and words[0] in {"a", "an", "the", "some", "two"}:
        words = words[1:]
    if len(words) > 1 and words[-1] == "face":
        words = words[:-1]
    if len(words) > 1 and words[0] == "oncoming":
        words = words[1:]
    return " ".join(_singular(word) for word in words)


def split_of(concept: str) -> str:
    """The side of a concept in every task: "public" (captions only), "test", "val" or "train".

    In the long run one sixth, 7/24, 1/8 and 5/12 of the concepts.
    Hash-based, so that it depends on nothing but the name and never changes when sources are added.

    Example:
        >>> [split_of(name) for name in ("dog", "owl", "bee", "fig")]
        ['test', 'train', 'train', 'public']
    """
    concept = normalise(concept)
    if _hash("public/" + concept) % 6 == 0:
        return "public"
    place = _hash("split/" + concept) % 20
    return "test" if place < 7 else "val" if place < 10 else "train"


def of_split(pictures: Sequence[Picture], split: str) -> list[Picture]:
    """The pictures whose concept lies on one side, in their order."""
    return [picture for picture in pictures if split_of(picture.concept) == split]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("atoes"):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is", "ros")) and len(word) > 3:
        return word[:-1]
    return word


def _rasterised(path: AnyPath, size: int) -> Image.Image:
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError("SVG pictures need resvg_py: pip install 'lightning-pfl[benchmark]'.") from error
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=size))))
