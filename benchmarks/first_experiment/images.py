"""Pictures of the first experiment: a bank of real drawings and photographs, and the tasks drawn from it.

Every picture has a *concept* (what it shows) and a *domain* (who drew it). A concept lies on one side of one split:
public (alignment, projector), train, validation or test, whatever its domain.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

SIZE = 128
VENDORS = ("google", "twitter", "fluent", "openmoji")


@dataclass(frozen=True)
class Picture:
    """One picture of the bank: what it shows, who drew it, which emoji group it belongs to ("" if none)."""

    concept: str
    domain: str
    group: str
    path: str


def split_of(concept: str) -> str:
    """Side of a concept: 20 % public, 40 % train, 15 % validation, 25 % test."""
    bucket = int(hashlib.sha256(f"second/{concept.strip().lower()}".encode()).hexdigest(), 16) % 20
    return "public" if bucket < 4 else "train" if bucket < 12 else "val" if bucket < 15 else "test"


def bank(raw: Path) -> list[Picture]:
    """All pictures under ``raw`` (unpacked npm and Debian archives)."""
    npm, out = raw / "npm", []
    names = {
        r["hexcode"].lower(): r["annotation"]
        for r in csv.DictReader((npm / "openmoji-17.0.0/package/data/openmoji.csv").open(encoding="utf8"))
    }
    for e in json.loads((npm / "emoji-datasource-google-16.0.0/package/emoji.json").read_text(encoding="utf8")):
        key = e["unified"].lower()
        short = key.replace("-fe0f", "")
        files = {
            "google": [npm / f"emoji-datasource-google-16.0.0/package/img/google/64/{key}.png"],
            "twitter": [npm / f"emoji-datasource-twitter-16.0.0/package/img/twitter/64/{key}.png"],
            "fluent": [npm / f"lobehub-fluent-emoji-3d-1.1.0/package/assets/{k}.webp" for k in (key, short)],
            "openmoji": [npm / f"openmoji-17.0.0/package/color/svg/{k.upper()}.svg" for k in (key, short)],
        }
        found = {d: next((p for p in ps if p.exists()), None) for d, ps in files.items()}
        if None in found.values():
            continue
        concept = names.get(key, names.get(short, e["name"].lower()))
        out += [Picture(concept, d, f"{e['category']}/{e['subcategory']}", str(p)) for d, p in found.items()]
    art = raw / "deb/pysiogame/usr/share/games/pysiogame/res/images/art4apps"
    for p in sorted(art.glob("*/*.jpg")):
        out.append(Picture(p.stem.replace("_", " "), "art4apps", p.parent.name, str(p)))
    stamps = raw / "deb/tuxpaint-stamps-default/usr/share/tuxpaint/stamps"
    for p in sorted(stamps.rglob("*.png")):
        rel = p.relative_to(stamps)
        if any(
            w in str(rel)
            for w in ("cartoon", "symbols", "house", "clothes", "_mirror", "_flip", "seasonal", "roadsigns")
        ):
            continue
        caption = p.with_suffix(".txt")
        text = caption.read_text(encoding="utf8", errors="ignore").splitlines()[0] if caption.exists() else p.stem
        out.append(Picture(text.strip(" .!").lower(), "photo", str(rel.parent), str(p)))
    clip = raw / "deb/openclipart-png/usr/share/openclipart/png"
    for p in sorted(clip.glob("animals/*/**/*.png")):
        if not p.is_symlink():
            out.append(Picture(p.stem.split("_")[0], "clipart", str(p.parent.relative_to(clip)), str(p)))
    return out


def render(path: str, size: int = SIZE) -> Image.Image:
    """Picture on white, ``size`` x ``size``, RGB."""
    if path.endswith(".svg"):
        import resvg_py

        im = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=path, width=size))))
    else:
        im = Image.open(path)
    im = im.convert("RGBA")
    im.thumbnail((size, size)) if max(im.size) > size else None
    if max(im.size) < size:
        k = size / max(im.size)
        im = im.resize((max(1, round(im.width * k)), max(1, round(im.height * k))), Image.BICUBIC)
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(im, ((size - im.width) // 2, (size - im.height) // 2))
    return canvas.convert("RGB")


# --------------------------------------------------------------------------------------------------------------
# operations: picture and answer -> picture
Op = Callable[[Image.Image, str, random.Random], Image.Image]


def damage(im: Image.Image, answer: str, rng: random.Random) -> Image.Image:
    """Mild photo damage."""
    if answer == "blurry":
        return im.filter(ImageFilter.GaussianBlur(rng.uniform(0.9, 2.0)))
    if answer == "noisy":
        a = np.asarray(im, np.float32)
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(8, 22), a.shape)
        return Image.fromarray(np.clip(a + noise, 0, 255).astype(np.uint8))
    if answer == "dark":
        return ImageEnhance.Brightness(im).enhance(rng.uniform(0.55, 0.8))
    return im


def turn(im: Image.Image, answer: str, rng: random.Random) -> Image.Image:
    """Quarter turns."""
    angle = {"up": 0, "left": 90, "down": 180, "right": 270}[answer] + rng.uniform(-12, 12)
    return im.rotate(angle, Image.BICUBIC, fillcolor="white")


def copies(im: Image.Image, answer: str, rng: random.Random) -> Image.Image:
    """One to four copies on a white canvas."""
    n = {"one": 1, "two": 2, "three": 3, "four": 4}[answer]
    canvas, cells = Image.new("RGB", (SIZE, SIZE), "white"), rng.sample([(x, y) for x in range(3) for y in range(3)], n)
    side = rng.randint(34, 44)
    for x, y in cells:
        canvas.paste(im.resize((side, side), Image.BICUBIC), (x * 42 + rng.randint(0, 2), y * 42 + rng.randint(0, 2)))
    return canvas


def tint(im: Image.Image, answer: str, rng: random.Random) -> Image.Image:
    """A colour cast."""
    a = np.asarray(im, np.float32)
    k = rng.uniform(0.10, 0.22)
    gain = {"red": (1, 1 - k, 1 - k), "green": (1 - k, 1, 1 - k), "blue": (1 - k, 1 - k, 1), "white": (1, 1, 1)}[answer]
    return Image.fromarray(np.clip(a * np.array(gain), 0, 255).astype(np.uint8))


def keep(im: Image.Image, answer: str, rng: random.Random) -> Image.Image:
    """The picture with a small shift and flip, so that one concept gives several samples."""
    if rng.random() < 0.5:
        im = im.transpose(Image.FLIP_LEFT_RIGHT)
    side = rng.randint(96, SIZE)
    canvas = Image.new("RGB", (SIZE, SIZE), "white")
    canvas.paste(im.resize((side, side), Image.BICUBIC), (rng.randint(0, SIZE - side), rng.randint(0, SIZE - side)))
    return canvas
